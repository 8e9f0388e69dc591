from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import jobs
from jobs.control import supervisor
from jobs.control.supervisor import MAX_QUICK_DEATHS
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

supervise = functools.partial(supervisor.supervise, pause_seconds=0.01)


@pytest.fixture(autouse=True)
def without_traces() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def child(tmp_path: Path, script: str) -> list[str]:
    """A command that notes that it was started, then runs `script`; `starts` is how often it was started."""
    log = tmp_path / "starts"
    note = f"echo >> {log}; starts=$(wc -l < {log})"
    return ["sh", "-c", f"{note}; {script}"]


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text().splitlines())


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_exit_code_of_a_driver_that_ends_by_itself_is_passed_on(tmp_path: Path, code: int) -> None:
    assert supervise(child(tmp_path, f"exit {code}")) == code
    assert starts(tmp_path) == 1


def test_a_killed_driver_is_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(child(tmp_path, "[ $starts = 3 ] && exit 5; kill -KILL $$")) == 5

    assert starts(tmp_path) == 3
    assert capfd.readouterr().err.count("the driver was killed (SIGKILL); starting it again") == 2


def test_quick_deaths_in_a_row_are_given_up(tmp_path: Path) -> None:
    assert supervise(child(tmp_path, "kill -KILL $$")) == 1

    assert starts(tmp_path) == MAX_QUICK_DEATHS + 1


def test_deaths_after_a_long_life_are_not_counted(tmp_path: Path) -> None:
    lives = 2 * MAX_QUICK_DEATHS

    assert supervise(child(tmp_path, f"[ $starts = {lives} ] && exit 0; kill -KILL $$"), quick_death_seconds=0.0) == 0

    assert starts(tmp_path) == lives


def supervised(command: list[str], pause_seconds: float) -> subprocess.Popen[str]:
    code = (
        "import sys; from jobs.control.supervisor import supervise;"
        "sys.exit(supervise(sys.argv[2:], pause_seconds=float(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(jobs.__file__).parent.parent)}
    arguments = [sys.executable, "-c", code, str(pause_seconds), *command]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("trap 'echo > saved; exit 0' TERM; echo > ready; while :; do sleep 0.05; done", 0),  # saves and ends well
        ("echo > ready; while :; do sleep 0.05; done", 1),  # dies of the signal
    ],
    ids=["graceful", "abrupt"],
)
def test_sigterm_is_forwarded_and_ends_the_job(tmp_path: Path, script: str, code: int) -> None:
    process = supervised(child(tmp_path, f"cd {tmp_path}; {script}"), pause_seconds=0.01)
    wait_for(tmp_path / "ready")

    process.terminate()

    assert process.wait(timeout=30) == code
    assert (tmp_path / "saved").exists() == (code == 0)
    assert starts(tmp_path) == 1


def test_sigterm_between_two_lives_starts_no_other(tmp_path: Path) -> None:
    process = supervised(child(tmp_path, "kill -KILL $$"), pause_seconds=1.0)
    assert process.stderr
    assert "starting it again" in process.stderr.readline()

    process.terminate()

    assert process.wait(timeout=30) == 1
    assert starts(tmp_path) == 1


def test_a_driver_that_can_tell_nothing_leaves_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path), "first")
    run.claim(named_recipe("tiny"))
    monkeypatch.setattr(supervisor, "supervise", lambda command, environ: 1 if run.url in command else 0)

    assert supervisor.drive([run.url], os.environ) == 1

    assert run.read_heartbeat()["state"] == "failed"
    assert "`convmae logs first` has what it printed" in run.read_events()[0]["reason"]
