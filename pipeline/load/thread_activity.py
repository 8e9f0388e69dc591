"""Activities of a loader's threads, each with its start: what a stall is reported with."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

Stage = Literal["read", "decode"]
NO_SAMPLE = -1


class ThreadActivity(NamedTuple):
    """One thing that one thread is doing."""

    stage: Stage
    what: str
    since_seconds: float
    """By the clock."""
    sample_id: int = NO_SAMPLE
    """That is being decoded."""


class ThreadActivities:
    """The activities of threads now. Nothing here waits for a lock, since it is read when something hangs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._now: dict[int, ThreadActivity] = {}

    @contextlib.contextmanager
    def doing(self, stage: Stage, what: str, sample_id: int = NO_SAMPLE) -> Iterator[None]:
        """Note it while the block runs."""
        thread = threading.get_ident()
        outer = self._now.get(thread)
        self.note(thread, ThreadActivity(stage, what, self.clock(), sample_id))
        try:
            yield
        finally:
            self.note(thread, outer)

    def note(self, thread: int, activity: ThreadActivity | None) -> None:
        """What a thread is doing from now on; None: nothing."""
        if activity:
            self._now[thread] = activity
        else:
            del self._now[thread]

    def oldest(self, stage: Stage) -> str:
        """The activity that has taken longest in a stage, for messages."""
        return oldest(list(self._now.values()), stage, self.clock())


def oldest(activities: Iterable[ThreadActivity], stage: Stage, now: float) -> str:
    """The activity that has taken longest in a stage, for messages.

    Args:
        activities: Of all threads.
        stage: The one that is meant.
        now: By the clock.
    """
    found = [activity for activity in activities if activity.stage == stage]
    if not found:
        return "no thread is in this stage"
    activity = min(found, key=lambda activity: activity.since_seconds)
    return f"{activity.what}, for {now - activity.since_seconds:.0f} s"
