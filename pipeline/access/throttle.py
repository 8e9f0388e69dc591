"""A limit on the requests that a process sends to one store at once, lowered while the store is too busy.

Threads that back off each on their own keep a busy store busy: eight of them send eight times as much. Here they share
one limit. A 503 or SlowDown halves it, down to one request at a time that probes for all; answers raise it again by
one for each round of requests.

Source: Chiu and Jain 1989, additive increase and multiplicative decrease, doi:10.1016/0169-7552(89)90019-6.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

CUT_SECONDS = 0.1
"""Between two cuts: the refusals of requests that were sent together count once."""


class Throttle:
    """Turns at one store, shared by the threads of a process.

    Concurrency: safe to call from several threads.
    Blocking: turn() waits while as many requests are under way as are allowed.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = float(most)
        self._most = float(most)
        self._clock = clock
        self._under_way = 0
        self._cut_at = -CUT_SECONDS
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold one of the turns; wait for it first."""
        with self._changed:
            self._changed.wait_for(lambda: self._under_way < max(1, int(self.limit)))
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify()

    def refused(self) -> None:
        """Note that the store said it is too busy; call while holding the turn."""
        with self._changed:
            if self._clock() - self._cut_at >= CUT_SECONDS:
                self._cut_at = self._clock()
                self.limit = max(1.0, min(self.limit, self._under_way) / 2)

    def answered(self) -> None:
        """Note that the store did what it was asked to; call while holding the turn."""
        with self._changed:
            if self.limit < self._most:
                self.limit = min(self._most, self.limit + 1 / self.limit)
                self._changed.notify_all()
