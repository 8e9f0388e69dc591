"""The keeper of a local stack: a daemon that owns the services and restarts those that die.

Run as ``python -m jobs.stack.keeper <home>``, only by `local_stack.up`. While it runs, only it writes ``stack.json``.
A keeper that was killed can be replaced: the next one adopts the services that still run.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import psutil

from jobs.stack import processes, services
from jobs.stack.lock import StackLock
from jobs.stack.record import ServiceRecord, Stack, read_stack
from pipeline.host.process_identity import ProcessIdentity

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Wait before the restart after the first, second, ... death within the window; after one more the keeper gives up."""
WINDOW_SECONDS = 60.0
PR_SET_CHILD_SUBREAPER = 36


class Keeper:
    """Starts the services, watches them, restarts them.

    Owns: the services' processes, as children or adopted, and ``stack.json``.
    Failure: if it dies, the services continue unwatched until `up` starts another keeper or `down` ends them.
    """

    def __init__(self, stack: Stack, lock: StackLock, clock: Callable[[], float] = time.monotonic) -> None:
        """Make a keeper.

        Args:
            stack: Settings, and services of an earlier keeper that may still run.
            lock: Of the stack's home; services inherit it.
            clock: Monotonic seconds.
        """
        self._stack = stack
        self._lock = lock
        self._clock = clock
        self._deaths: defaultdict[str, list[float]] = defaultdict(list)
        self._stopping = False

    def run(self) -> None:
        """Keep the services running until `stop`; then end them and return."""
        self._save(replace(self._stack, keeper=ProcessIdentity.of(os.getpid())))
        while not self._stopping:
            self._lock.hold()
            for name in self._stack.settings.service_names:
                self.tend(name)
            _reap()
            time.sleep(POLL_SECONDS)
        processes.terminate(psutil.Process().children())
        while _reap():
            time.sleep(POLL_SECONDS)

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Have `run` end; a signal handler."""
        self._stopping = True

    def tend(self, name: str) -> None:
        """Start a service that has not been started, or that died and whose back-off is over."""
        service = self._stack.services[name]
        if service.gave_up or (service.process is not None and service.process.alive()):
            return
        if service.process is not None:
            self._note_death(name, service)
        elif not self._deaths[name] or self._clock() >= self._deaths[name][-1] + self._backoff_seconds(name):
            self._start(name, service)

    def _note_death(self, name: str, service: ServiceRecord) -> None:
        now = self._clock()
        self._deaths[name] = [*(death for death in self._deaths[name] if now - death < WINDOW_SECONDS), now]
        gave_up = len(self._deaths[name]) > len(BACKOFF_SECONDS)
        self._update(name, replace(service, process=None, gave_up=gave_up))
        assert service.process is not None
        if gave_up:
            logger.error(
                "%s (pid %d) died %d times within a minute; giving up",
                name,
                service.process.pid,
                len(self._deaths[name]),
            )
            return
        logger.warning("%s (pid %d) died; restart in %.1f s", name, service.process.pid, self._backoff_seconds(name))
        if name == "ray":
            logger.warning("the jobs of the dead Ray head are lost: submit them again, and they resume")
            processes.kill(self._ray_leftovers())

    def _backoff_seconds(self, name: str) -> float:
        return BACKOFF_SECONDS[len(self._deaths[name]) - 1]

    def _start(self, name: str, service: ServiceRecord) -> None:
        settings = self._stack.settings
        with (settings.home / "logs" / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                services.command(name, settings),
                env=services.service_environment(name, settings, os.environ),
                cwd=services.working_folder(name, settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ray's jobs write files for people to read; other services' files hold only what the stack serves.
                pass_fds=(self._lock.handle,),
                umask=-1 if name == "ray" else 0o077,
            )
        self._update(name, replace(service, process=ProcessIdentity.of(child.pid), starts=service.starts + 1))
        child.returncode = 0  # `_reap` waits for it; Popen must not
        logger.info("started %s (pid %d)", name, child.pid)

    def _ray_leftovers(self) -> set[psutil.Process]:
        """What a dead head leaves behind: raylet and workers, which as orphans became children of this process.

        The other services have no children, so every child that is not a service belongs to Ray.
        """
        alive = {record.pid for record in self._stack.records() if record.alive()}
        marked = processes.marked(self._stack.settings.stack_id)
        family = processes.with_descendants([psutil.Process(), *marked])
        return {process for process in family if process.pid not in alive}

    def _update(self, name: str, service: ServiceRecord) -> None:
        self._save(replace(self._stack, services={**self._stack.services, name: service}))

    def _save(self, stack: Stack) -> None:
        self._stack = stack
        stack.save()


def _reap() -> bool:
    """Collect children that have ended, including adopted orphans; return whether others are left."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
        return True
    return False


def main() -> None:
    """Run the keeper of the home named on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    home = Path(sys.argv[1])
    os.chdir(home)
    # Orphans of a dead Ray head become children of this process instead of init's, so that none is lost.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stack = read_stack(home)
    assert stack is not None, "up writes stack.json before it starts the keeper"
    keeper = Keeper(stack, StackLock(home))
    signal.signal(signal.SIGTERM, keeper.stop)
    try:
        keeper.run()
    except Exception:
        logger.exception("the keeper failed")
        raise


if __name__ == "__main__":
    main()
