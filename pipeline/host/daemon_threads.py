"""An executor of daemon threads: the interpreter can exit while one of them hangs in I/O.

The standard ThreadPoolExecutor joins its threads when the interpreter exits, so a read that never returns would turn a
reported stall into a silent one.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 5.0

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThreads(Executor):
    """A fixed number of daemon threads, started at once; tasks run in the order in which they came."""

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any] | None, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` on one of the threads."""
        future: Future[T] = Future()
        self._tasks.put((future, lambda: fn(*args, **kwargs)))
        return future

    def start(self, call: Callable[[], None]) -> None:
        """Run `call`, which must not raise, on one of the threads; it has no result, which saves the Future."""
        self._tasks.put((None, call))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after the remaining tasks, or without them; no more may be submitted.

        Waits for SHUTDOWN_SECONDS at most; a thread that hangs for longer is left behind.
        """
        if cancel_futures:
            with contextlib.suppress(queue.Empty):
                while True:
                    if (task := self._tasks.get_nowait()) and task[0]:
                        task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            deadline = time.monotonic() + SHUTDOWN_SECONDS
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            if left := [thread.name for thread in self._threads if thread.is_alive()]:
                logger.warning("left behind, since they are still busy: %s", ", ".join(left))

    def _work(self) -> None:
        while task := self._tasks.get():
            future, call = task
            del task
            if future is None:
                call()
                del call
                continue
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call  # an idle thread would keep the last block's bytes
