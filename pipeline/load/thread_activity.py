"""Activities of a loader's threads, each with its start: what a stall is reported with."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

Stage = Literal["read", "decode"]


class ThreadActivity(NamedTuple):
    """One thing that one thread is doing."""

    stage: Stage
    what: str
    since_seconds: float
    """By the clock."""


class ThreadActivities:
    """The activities of threads now. Nothing here waits for a lock, since it is read when something hangs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._now: dict[int, ThreadActivity] = {}

    @contextlib.contextmanager
    def doing(self, stage: Stage, what: str) -> Iterator[None]:
        """Note it while the block runs."""
        thread = threading.get_ident()
        outer = self._now.get(thread)
        self._now[thread] = ThreadActivity(stage, what, self.clock())
        try:
            yield
        finally:
            if outer:
                self._now[thread] = outer
            else:
                del self._now[thread]

    def oldest(self, stage: Stage) -> str:
        """The activity that has taken longest in a stage, for messages."""
        activities = [activity for activity in list(self._now.values()) if activity.stage == stage]
        if not activities:
            return "no thread is in this stage"
        activity = min(activities, key=lambda activity: activity.since_seconds)
        return f"{activity.what}, for {self.clock() - activity.since_seconds:.0f} s"
