"""Fixtures that several parts of the tests share."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from browser import chromium
from moto.server import ThreadedMotoServer
from playwright.sync_api import Browser

from jobs.stack.local_stack import down, up
from jobs.stack.record import Stack
from pipeline.store.storage import Storage

STACK_FILES = frozenset(
    f"tests/{name}.py"
    for name in (
        "jobs/ablate/test_killed_ablation",
        "jobs/checkpoint/test_damaged_checkpoints",
        "jobs/checkpoint/test_kills_in_saving",
        "jobs/cli/test_environments",
        "jobs/control/test_bad_samples",
        "jobs/control/test_failures",
        "jobs/finetune/test_finetune_run",
        "jobs/control/test_folder_runs",
        "jobs/control/test_goodput_run",
        "jobs/control/test_hangs",
        "jobs/control/test_iam_policies",
        "jobs/control/test_main_job",
        "jobs/control/test_micro_batch_run",
        "jobs/control/test_poisoned_runs",
        "jobs/probes/test_probed_run",
        "jobs/control/test_racing_drivers",
        "jobs/control/test_set_run",
        "jobs/control/test_settings_travel",
        "jobs/control/test_soak",
        "jobs/control/test_trajectory",
        "jobs/data/test_banded_commands",
        "jobs/data/test_datasets",
        "jobs/evaluate/test_evaluate_command",
        "jobs/metrics/test_live_metrics",
        "jobs/remote/test_command",
        "jobs/stack/test_local_stack",
        "jobs/consolidation/test_consolidate_cluster",
        "pipeline/load/test_chaos",
    )
)
"""Files with tests of the local stack. They share one and run in turn, beside all other tests (`pytest -n 2`); they
begin first, since they take longest. Two stacks beside each other take two cores twice as long."""


def pytest_configure(config: pytest.Config) -> None:
    """Refuse names in STACK_FILES of files that are gone, here where pytest-xdist shows the reason."""
    for file in sorted(STACK_FILES):
        if not (config.rootpath / file).is_file():
            raise pytest.UsageError(f"STACK_FILES in tests/conftest.py names {file}, which does not exist: correct it")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the local stack, check that STACK_FILES lists their files, and put them first."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        if "local_stack" in getattr(item, "fixturenames", ()):
            item.add_marker("stack")
            if file not in STACK_FILES:
                rule = f"{file} has tests of the local stack: add it to STACK_FILES in tests/conftest.py"
                raise pytest.UsageError(rule)
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in STACK_FILES)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute single tests, but those of the stack as one group.

    pytest-xdist 3.8's own groups, which are marks, are not seen by pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "stack" if nodeid.partition("::")[0] in STACK_FILES else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def heard_interrupts() -> None:
    """Let commands that tests interrupt receive SIGINT, which a shell has its background processes ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def token_of_this_process() -> str:
    """Token of the Ray clusters that tests start; Ray keeps the first token that a process sees for its whole life."""
    return secrets.token_hex(32)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A state folder for the tests, so that commands do not use that of the user who runs them."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def local_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The local stack, with real services, in a home of its own; one for the whole test session."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's own is 15: ranks would wait for other tests
    home = tmp_path_factory.mktemp("stack")
    yield up(home, num_cpus=4)
    down(home)


@pytest.fixture(scope="module")
def open_s3() -> Iterator[Storage]:
    """An S3 server that accepts any keys, with the bucket `bucket`."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    storage = Storage(f"http://{host}:{port}", "any", "any", region="us-east-1")
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=storage.endpoint_url, **keys).create_bucket(Bucket="bucket")
    yield storage
    moto.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser, for tests that `needs_browser` marks; not for longer, since it runs an event loop here."""
    with chromium() as started:
        yield started
