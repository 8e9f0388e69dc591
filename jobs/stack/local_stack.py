"""The local stack: an S3 server, a Ray head and, if installed, Prometheus, on the loopback address.

`up` starts it and returns when every service has answered; `down` ends all its processes and keeps the data. In
between, a keeper process (`jobs.stack.keeper`) owns the services and restarts what dies. `jobs.stack.record` says what
is running.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from jobs.run.own_code import module_command, module_environ
from jobs.stack import lock as stack_lock
from jobs.stack import ports as stack_ports
from jobs.stack import processes as stack_processes
from jobs.stack import services as stack_services
from jobs.stack.processes import STACK_ID_VARIABLE
from jobs.stack.record import ServiceRecord, Stack, read_stack, resolved, state_path
from jobs.stack.services import StackSettings
from pipeline.errors import UserError, clipped
from pipeline.host.process_identity import ProcessIdentity

logger = logging.getLogger(__name__)

START_LIMIT_SECONDS = 90.0
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.05
LOG_TAIL_LINES = 15

OnEvent = Callable[[str], None]


class StackError(RuntimeError):
    """A service of the local stack could not be started; the message quotes the end of its log."""


def up(
    home: Path,
    *,
    s3_port: int = 0,
    ray_port: int = 0,
    dashboard_port: int = 0,
    prometheus_port: int = 0,
    num_cpus: int | None = None,
    on_event: OnEvent = logger.info,
) -> Stack:
    """Start the stack of ``home`` and return when every service has answered.

    A running stack keeps its ports, credentials and data; only what is missing is started.

    Args:
        home: Folder for data, logs and state; made private to its owner.
        s3_port: Port of the S3 server; 0 for a free one, as for the other ports.
        ray_port: Port of Ray's control store (GCS).
        dashboard_port: Port of Ray's dashboard and job API.
        prometheus_port: Port of Prometheus.
        num_cpus: CPUs that Ray may give to tasks; None: as many as the machine has.
        on_event: Called with each line for the user.

    Raises:
        UserError: If a requested port is not free, the S3 server is not installed, the home cannot be made, or its
            stack runs in another container. Nothing was started.
        StackError: If a service does not start. A stack that was not running before is taken down again.
    """
    home = _private_folder(home)
    requested = {"s3": s3_port, "ray": ray_port, "dashboard": dashboard_port, "prometheus": prometheus_port}
    with _locked(home):
        running = Stack.load(home)
        if running is not None:
            if _is_beyond_reach(running):
                raise _of_another_container(home)
            stack_ports.check_same(requested, running.settings.ports)
            if all(service.healthy for service in running.status().values()):
                on_event(f"already running: S3 {running.endpoint}, Ray {running.dashboard_url}")
                return running
        stack = running or _plan(home, requested, num_cpus)
        if stack.settings.prometheus_binary is None:
            on_event(
                "no Prometheus is installed, so metrics are not kept (apt-get install prometheus); the live page of "
                "each run, and `convmae ui` for all, need none"
            )
        try:
            return _start(stack, on_event)
        except BaseException:
            if running is None:
                _end(read_stack(home) or stack)
            raise


def down(home: Path, *, on_event: OnEvent = logger.info) -> bool:
    """End every process of the stack of ``home``; data is kept. Returns whether something was running.

    Processes get SIGTERM and, five seconds later, SIGKILL. Only processes that the stack started are ended: they are
    known by their recorded identity, by the stack's id in their environment, and by descent from these.

    Raises:
        UserError: If the stack runs in another container.
    """
    home = resolved(home)
    if read_stack(home) is None:
        on_event("nothing is running")
        return False
    with _locked(home):
        stack = read_stack(home)
        # From outside a container, its processes can be seen and are known by the stack's id.
        if stack is not None and _is_beyond_reach(stack) and not any(stack_processes.marked(stack.settings.stack_id)):
            raise _of_another_container(home)
        ended = 0 if stack is None else _end(stack)
    on_event(f"ended {ended} processes; data is kept in {home / 's3'}" if ended else "nothing is running")
    return ended > 0


def _is_beyond_reach(stack: Stack) -> bool:
    """Whether it is running, and none of its recorded processes in this PID namespace."""
    return stack_lock.is_held(stack.settings.home) and not stack.is_seen()


def _of_another_container(home: Path) -> UserError:
    remedy = "use it where it was started, or name another folder"
    rule = "must not belong to a stack that runs in another container"
    return UserError("CONVMAE_HOME", rule, str(home), remedy)


def _private_folder(home: Path) -> Path:
    """Make a home, private to its owner; leaves no folder behind if it cannot be made.

    Raises:
        UserError: It cannot be made or written.
    """
    home = resolved(home)
    made: list[Path] = []
    try:
        for folder in reversed([home, *home.parents]):
            if not folder.is_dir():
                folder.mkdir()
                made.append(folder)
        home.chmod(0o700)
    except OSError as error:
        for folder in reversed(made):
            folder.rmdir()
        rule = f"must be a folder that can be made and written ({os.strerror(error.errno or 0)})"
        raise UserError("CONVMAE_HOME", rule, clipped(str(home)), "name another folder") from error
    return home


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Let only one `up` or `down` at a time work on a home; the lock ends with its process."""
    with (home / "stack.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _plan(home: Path, requested: dict[str, int], num_cpus: int | None) -> Stack:
    """Choose ports and credentials; keeps those of a stack that ended without `down`, if the ports are free."""
    stack_services.s3_binary()
    before = read_stack(home)
    if before is not None:
        kept = {name: getattr(before.settings.ports, name) for name in requested}
        requested = {name: port or stack_ports.is_free(kept[name]) * kept[name] for name, port in requested.items()}
    ports = stack_ports.choose(requested)
    if before is not None:
        _end(before)
    settings = StackSettings(
        stack_id=secrets.token_hex(16),
        home=home,
        run_dir=Path(tempfile.mkdtemp(prefix="convmae-", dir="/tmp")),
        ports=ports,
        access_key=before.settings.access_key if before else secrets.token_hex(10).upper(),
        secret_key=before.settings.secret_key if before else secrets.token_urlsafe(30),
        internal_key=secrets.token_hex(32),
        num_cpus=num_cpus,
        prometheus_binary=shutil.which("prometheus"),
    )
    stack_services.write_configuration(settings, token=secrets.token_hex(32))
    return Stack(settings, None, {name: ServiceRecord() for name in settings.service_names})


def _start(stack: Stack, on_event: OnEvent) -> Stack:
    keeper = stack.keeper
    if keeper is None or not keeper.alive() or any(service.gave_up for service in stack.services.values()):
        keeper = _launch_keeper(stack)
    started = time.monotonic()
    waiting = {name: stack.services[name].starts for name in stack.settings.service_names}
    now = stack
    while waiting or now.keeper != keeper:
        for name in [name for name in waiting if stack_services.is_healthy(name, stack.settings)]:
            del waiting[name]
            on_event(f"{name} is ready at {stack.address(name)} ({time.monotonic() - started:.1f} s)")
        time.sleep(POLL_SECONDS)
        now = read_stack(stack.settings.home) or stack
        _check_progress(now, keeper, waiting, time.monotonic() - started)
    return now


def _check_progress(
    stack: Stack, keeper: ProcessIdentity, starts_before: dict[str, int], waited_seconds: float
) -> None:
    for name, starts in starts_before.items():
        if stack.services[name].starts > starts + 1 or stack.services[name].gave_up:
            raise StackError(f"{name} ended while it was starting. {_log_tail(stack, name)}")
        if waited_seconds > START_LIMIT_SECONDS:
            raise StackError(f"{name} did not answer within {START_LIMIT_SECONDS:.0f} s. {_log_tail(stack, name)}")
    if not keeper.alive():
        raise StackError(f"the keeper ended while the services were starting. {_log_tail(stack, 'keeper')}")


def _launch_keeper(stack: Stack) -> ProcessIdentity:
    """Start a keeper in a session of its own; it adopts the services that are running and starts the others."""
    if stack.keeper is not None:
        _kill(stack.keeper)
    services = {name: replace(service, gave_up=False) for name, service in stack.services.items()}
    replace(stack, services=services).save()
    home = stack.settings.home
    (home / "logs").mkdir(exist_ok=True)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        sys.executable,
        module_command(sys.executable, "jobs.stack.keeper", str(home)),
        {**module_environ(os.environ), STACK_ID_VARIABLE: stack.settings.stack_id},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(home / "logs" / "keeper.log"), append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return ProcessIdentity.of(pid)


def _log_tail(stack: Stack, name: str) -> str:
    log = stack.settings.home / "logs" / f"{name}.log"
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if log.exists() else []
    return "\n".join([f"The end of {log}:", *lines])


def _end(stack: Stack) -> int:
    """End every process of the stack and remove what is not data; return how many processes there were."""
    family = _family(stack)
    if stack.keeper is not None and (keeper := stack.keeper.process()) is not None:
        stack_processes.terminate([keeper])  # first, or it would restart what ends
    stack_processes.terminate(family)
    deadline = time.monotonic() + GRACE_SECONDS
    while stack_processes.running(family) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    # What is left, and what was started in the meantime
    while left := _family(stack) | stack_processes.running(family):
        stack_processes.kill(left)
        time.sleep(POLL_SECONDS)
    if stack.keeper is not None:
        stack_processes.reap(stack.keeper)
    stack_services.remove_configuration(stack.settings)
    state_path(stack.settings.home).unlink(missing_ok=True)
    return len(family)


def _family(stack: Stack) -> set[psutil.Process]:
    recorded = [process for record in stack.records() if (process := record.process()) is not None]
    marked = stack_processes.marked(stack.settings.stack_id)
    return stack_processes.running(stack_processes.with_descendants([*recorded, *marked]))


def _kill(record: ProcessIdentity) -> None:
    if (process := record.process()) is not None:
        stack_processes.kill([process])
    stack_processes.reap(record)
