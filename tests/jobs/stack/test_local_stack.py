"""The local stack with its real services: each test leaves the shared one as healthy as it found it."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import botocore.config
import botocore.exceptions
import botocore.session
import in_a_namespace_of_its_own
import prometheus_client
import psutil
import pytest

from jobs.stack import processes as stack_processes
from jobs.stack.local_stack import StackError, down, up
from jobs.stack.ports import PortError, choose
from jobs.stack.record import ServiceRecord, Stack, read_stack
from jobs.stack.services import StackSettings
from pipeline.errors import UserError
from pipeline.host.process_identity import ProcessIdentity
from pipeline.store.storage import Storage

RAY_JOB = """
import json, os, sys
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient()
job = client.submit_job(entrypoint="python -c 'import os; print(os.environ[\\"AWS_ENDPOINT_URL\\"])'")
while not client.get_job_status(job).is_terminal():
    pass
print(json.dumps({"status": client.get_job_status(job).value, "logs": client.get_job_logs(job)}))
"""


def s3_client(stack: Stack, secret_key: str | None = None) -> Any:
    environment = stack.environment()
    return botocore.session.get_session().create_client(
        "s3",
        region_name=environment["AWS_REGION"],
        endpoint_url=stack.endpoint,
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret_key or environment["AWS_SECRET_ACCESS_KEY"],
        config=botocore.config.Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )


def family(stack: Stack) -> set[psutil.Process]:
    """Every process of the stack, found from outside: by the recorded pids and their descendants."""
    recorded = [process for record in stack.records() if (process := record.process()) is not None]
    return stack_processes.with_descendants([*recorded, *stack_processes.marked(stack.settings.stack_id)])


def wait_until(condition: Callable[[], bool], limit_seconds: float = 120) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_seconds, "the condition did not come true"
        time.sleep(0.05)
    return time.monotonic() - started


def all_healthy(stack: Stack) -> bool:
    now = Stack.load(stack.settings.home)
    return now is not None and all(service.healthy for service in now.status().values())


def pid_of(stack: Stack, name: str) -> int | None:
    now = read_stack(stack.settings.home)
    assert now is not None
    process = now.services[name].process
    return None if process is None else process.pid


def kill_service(stack: Stack, name: str) -> int:
    pid = pid_of(stack, name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid_of(stack, name) not in {pid, None})
    return pid


def test_every_service_is_healthy_when_up_returns(local_stack: Stack) -> None:
    # Another test of the session may have killed a service, which then has a new pid.
    stack = Stack.load(local_stack.settings.home)

    assert stack is not None
    assert {name: status.healthy for name, status in stack.status().items()} == dict.fromkeys(
        ["keeper", *stack.settings.service_names], True
    )


def test_s3_accepts_its_own_credentials_and_no_others(local_stack: Stack) -> None:
    client = s3_client(local_stack)
    client.put_object(Bucket=local_stack.bucket, Key="served", Body=b"pixels")

    assert client.get_object(Bucket=local_stack.bucket, Key="served")["Body"].read() == b"pixels"
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        s3_client(local_stack, secret_key="wrong").get_object(Bucket=local_stack.bucket, Key="served")


def test_the_filer_behind_s3_refuses_requests_without_a_signature(local_stack: Stack) -> None:
    s3_client(local_stack).put_object(Bucket=local_stack.bucket, Key="behind", Body=b"pixels")

    with pytest.raises(OSError, match="401"):
        urlopen(f"http://127.0.0.1:{local_stack.settings.ports.filer}/buckets/{local_stack.bucket}/behind")


def test_ray_refuses_requests_without_the_token(local_stack: Stack) -> None:
    with pytest.raises(OSError, match="401"):
        urlopen(f"{local_stack.dashboard_url}/api/jobs/")


def test_all_sockets_listen_on_the_loopback_address(local_stack: Stack) -> None:
    pids = {process.pid for process in family(local_stack)}
    listening = [
        socket_
        for socket_ in psutil.net_connections(kind="inet")
        if socket_.pid in pids and socket_.status == psutil.CONN_LISTEN
    ]

    assert len(listening) > 12
    for socket_ in listening:
        address = ipaddress.ip_address(socket_.laddr.ip)
        assert (getattr(address, "ipv4_mapped", None) or address).is_loopback, socket_


def test_secrets_are_readable_by_their_owner_alone_and_absent_from_the_repr(local_stack: Stack) -> None:
    home = local_stack.settings.home
    files = [home / "stack.json", local_stack.token_path, local_stack.settings.identities_path]

    assert [stat.S_IMODE(path.stat().st_mode) for path in [home, *files]] == [0o700, 0o600, 0o600, 0o600]
    assert local_stack.environment()["AWS_SECRET_ACCESS_KEY"] not in repr(local_stack)
    assert local_stack.settings.internal_key not in repr(local_stack)


def test_up_of_a_healthy_stack_changes_nothing_and_says_so(local_stack: Stack) -> None:
    events: list[str] = []

    again = up(local_stack.settings.home, on_event=events.append)

    assert again == Stack.load(local_stack.settings.home)
    assert again.settings == local_stack.settings
    assert len(events) == 1
    assert "already running" in events[0]


def test_a_killed_s3_server_returns_on_its_port_with_its_data(local_stack: Stack) -> None:
    client = s3_client(local_stack)
    client.put_object(Bucket=local_stack.bucket, Key="survivor", Body=b"x" * 5_000_000)

    kill_service(local_stack, "s3")
    wait_until(lambda: all_healthy(local_stack))

    # Through Storage, as commands read: for a moment the server answers 500, until its volumes have registered again.
    storage = Storage.from_environment(local_stack.environment())
    assert storage.read(f"s3://{local_stack.bucket}/survivor") == b"x" * 5_000_000


def test_a_killed_ray_head_returns_on_its_ports_and_leaves_no_process_behind(local_stack: Stack) -> None:
    head = pid_of(local_stack, "ray")
    before = stack_processes.with_descendants([psutil.Process(head)])

    kill_service(local_stack, "ray")
    wait_until(lambda: all_healthy(local_stack))

    assert not stack_processes.running(before)
    assert "jobs of the dead Ray head are lost" in (local_stack.settings.home / "logs" / "keeper.log").read_text()


def test_a_job_submitted_with_the_token_sees_the_s3_server(local_stack: Stack) -> None:
    # In a process of its own: Ray reads its mode of authentication once, when it is imported.
    output = subprocess.run(
        [sys.executable, "-c", RAY_JOB],
        env=os.environ | local_stack.environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    job = json.loads(output.splitlines()[-1])
    assert job["status"] == "SUCCEEDED"
    assert local_stack.endpoint in job["logs"]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_scrapes_ray_and_the_exporters_of_runs(local_stack: Stack) -> None:
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1")
    target = {"targets": [f"127.0.0.1:{server.server_port}"], "labels": {"run_id": "tiny"}}
    (local_stack.targets_dir / "tiny.json").write_text(json.dumps([target]))

    def scraped() -> set[str]:
        targets = json.load(urlopen(f"{local_stack.prometheus_url}/api/v1/targets"))["data"]["activeTargets"]
        return {
            target["labels"].get("run_id", target["labels"]["job"]) for target in targets if target["health"] == "up"
        }

    try:
        wait_until(lambda: scraped() == {"ray", "tiny"})
    finally:
        (local_stack.targets_dir / "tiny.json").unlink()
        server.shutdown()
        thread.join()


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        with pytest.raises(PortError, match="--s3-port: must be a free TCP port"):
            up(tmp_path, s3_port=other.getsockname()[1])

    assert read_stack(tmp_path) is None


def test_the_log_of_a_service_that_dies_at_start_is_quoted_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bin" / "prometheus"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho the disk is made of cheese\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}{os.pathsep}{os.environ['PATH']}")
    home = tmp_path / "home"

    with pytest.raises(StackError, match=r"(?s)prometheus ended while it was starting.*made of cheese"):
        up(home)

    assert read_stack(home) is None
    assert not [process for process in psutil.process_iter() if str(home) in " ".join(_command_line(process))]


def test_data_survives_down_and_a_killed_keeper_leaves_no_process_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "sh", "ps"):  # what Ray starts by name
        (tools / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tools))
    home = tmp_path / "home"
    events: list[str] = []

    first = up(home, num_cpus=1, on_event=events.append)
    assert any("apt-get install prometheus" in event for event in events)
    assert first.prometheus_url is None
    s3_client(first).put_object(Bucket=first.bucket, Key="kept", Body=b"pixels")
    processes = family(first)
    assert down(home)
    assert not stack_processes.running(processes)
    assert not first.settings.run_dir.exists()
    assert Stack.load(home) is None
    assert not down(home)

    second = up(home, num_cpus=1)
    assert s3_client(second).get_object(Bucket=second.bucket, Key="kept")["Body"].read() == b"pixels"
    assert second.keeper is not None
    os.kill(second.keeper.pid, signal.SIGKILL)
    wait_until(lambda: not second.keeper.alive())
    adopted = up(home, num_cpus=1)
    assert adopted.services == second.services
    assert adopted.keeper is not None
    kill_service(adopted, "s3")

    os.kill(adopted.keeper.pid, signal.SIGKILL)
    processes = family(adopted)
    assert down(home)
    assert not stack_processes.running(processes)


def test_down_spares_processes_that_merely_have_a_recorded_pid(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        real = ProcessIdentity.of(bystander.pid)
        stale = replace(real, started=real.started - 1)
        settings = StackSettings("id", tmp_path, tmp_path / "run", choose({}), "key", "secret", "internal", 1, None)
        services = {name: ServiceRecord(stale) for name in settings.service_names}
        Stack(settings, stale, services).save()

        assert Stack.load(tmp_path) is None
        assert not down(tmp_path)

        assert bystander.poll() is None
        assert read_stack(tmp_path) is None
    finally:
        bystander.kill()
        bystander.wait()


HOLDS_A_HOME = """
import sys, time
from pathlib import Path
from jobs.stack.keeper import Keeper
from jobs.stack.lock import StackLock
from jobs.stack.record import read_stack
home = Path(sys.argv[1])
lock = StackLock(home)
keeper = Keeper(read_stack(home), lock)
keeper.tend("s3")
lock.hold()
print("held", flush=True)
time.sleep(60)
"""


UP_AND_DOWN = """
import sys
from pathlib import Path
from jobs.stack.local_stack import down, up
for change in (up, down):
    try:
        change(Path(sys.argv[1]))
    except Exception as error:
        print(error, flush=True)
"""


@pytest.mark.skipif(not in_a_namespace_of_its_own.is_allowed(), reason="this machine makes no PID namespaces")
def test_a_stack_of_another_container_is_neither_started_twice_nor_taken_down(tmp_path: Path) -> None:
    settings = StackSettings(
        str(tmp_path), tmp_path, tmp_path / "run", choose({}), "key", "secret", "internal", 1, None
    )
    Stack(settings, None, {name: ServiceRecord() for name in settings.service_names}).save()
    (tmp_path / "logs").mkdir()
    for folder in (settings.run_dir / "s3", tmp_path / "s3"):
        folder.mkdir(parents=True)
    settings.identities_path.write_text("{}")
    with in_a_namespace_of_its_own.running(HOLDS_A_HOME, str(tmp_path)) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with in_a_namespace_of_its_own.running(UP_AND_DOWN, str(tmp_path)) as third:
            assert third.stdout
            told = third.stdout.read().splitlines()
        with pytest.raises(UserError, match="must not belong to a stack that runs in another container"):
            up(tmp_path)
        assert len(told) == 2 and all(
            "must not belong to a stack that runs in another container" in line for line in told
        )
        loaded = Stack.load(tmp_path)
        assert loaded is not None and not loaded.is_seen()
        assert settings.identities_path.exists() and settings.run_dir.exists()

    # The container is gone, and the processes that it recorded mean nothing here.
    wait_until(lambda: Stack.load(tmp_path) is None)
    assert not down(tmp_path)
    assert not settings.run_dir.exists()


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []
