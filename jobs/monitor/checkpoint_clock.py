"""The clock of checkpoints: when the ranks should save, where the interval is one of time.

The ranks' own clocks differ, and all must save after the same step. So the monitor keeps the time, and its instruction
travels with the next step's sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from jobs.recipe.checkpoint_interval import Costs, Decision, IntervalRule, auto_interval

REMEMBERED = 9
"""Newest saves, and restarts, whose medians count: what another world size or another store brings is soon seen."""
DIFFERENT_RATIO = 0.1
"""An interval that changes by less is left as it is; the costs near the best one are flat."""


class CheckpointClock:
    """The steps after which a save is due, and how far apart saves are.

    It learns from the run's events: those that earlier attempts left, and each new one. Saves that steps, milestones or
    a drain bring count as well.
    """

    def __init__(self, rule: IntervalRule, events: Iterable[Mapping[str, Any]]) -> None:
        """Begin.

        Args:
            rule: Of the recipe.
            events: Of all attempts so far, oldest first.
        """
        self._rule = rule
        self._stalls: deque[float] = deque(maxlen=REMEMBERED)
        self._uploads: deque[float] = deque(maxlen=REMEMBERED)
        self._restarts: deque[float] = deque(maxlen=REMEMBERED)
        self._seconds = _first_seconds(rule)
        self._is_explained = False
        self._counts_from: float | None = None
        self._under_way: int | None = None
        for event in events:
            self.see(event)

    def follow(self, rule: IntervalRule) -> None:
        """Go by another rule from now on; what was learned of costs stays."""
        if rule == self._rule:
            return
        self._rule, self._is_explained = rule, False
        self._seconds = _first_seconds(rule)

    @property
    def seconds(self) -> float | None:
        """From the beginning of one save to that of the next; None where the interval is one of steps."""
        return self._seconds

    def see(self, event: Mapping[str, Any]) -> None:
        """Take what an event of the run says of saves, restarts and the interval."""
        if "steps_redone" in event:  # an attempt begins
            self._counts_from = self._under_way = None
        elif event["kind"] == "checkpoint":
            self._stalls.append(event["stall_seconds"])
            self._uploads.append(event["duration_seconds"])
        elif event["kind"] == "recovered" and "detect_seconds" in event:  # after a failure, and no night's rest
            self._restarts.append(event["down_seconds"])
        elif event["kind"] == "checkpoint-interval" and self._rule.kind == "auto":
            self._seconds, self._is_explained = event["seconds"], True
        if event["kind"] in ("checkpoint", "checkpoint-failed") and event["step"] == self._under_way:
            self._under_way = None

    def save_began(self, step: int, now: float) -> None:
        """Note that the ranks save, for whatever reason.

        Args:
            step: After which they do.
            now: Monotonic seconds.
        """
        self._counts_from, self._under_way = now, step

    def is_due(self, now: float) -> bool:
        """Whether to save after the step that was just done; True until the ranks begin.

        Never while a save is under way, for which the next would have to wait. An attempt's time counts from its first
        step: until then there is nothing to lose.

        Args:
            now: Monotonic seconds, at a step of a running attempt.
        """
        if self._seconds is None:
            return False
        if self._counts_from is None:
            self._counts_from = now
        return self._under_way is None and now - self._counts_from >= self._seconds

    def decide(self, *, failures: int, worker_seconds: float, world_size: int) -> Decision | None:
        """Choose the interval again, with `auto`; what is returned is in force from now on.

        Args:
            failures: Of the worker group, since the run began.
            worker_seconds: Seconds that ranks trained, summed over them, since the run began.
            world_size: Ranks that train now.

        Returns:
            None where it stays.
        """
        if self._rule.kind != "auto" or self._seconds is None:
            return None
        costs = None
        if self._stalls:
            restart_seconds = median(self._restarts) if self._restarts else 0.0
            trained_seconds = worker_seconds / world_size
            costs = Costs(median(self._stalls), median(self._uploads), restart_seconds, failures, trained_seconds)
        found = auto_interval(self._rule, costs)
        is_similar = abs(found.seconds - self._seconds) <= DIFFERENT_RATIO * self._seconds
        if self._is_explained and is_similar and self._seconds == self._rule.bounded(self._seconds):
            return None
        self._seconds, self._is_explained = found.seconds, True
        return found


def _first_seconds(rule: IntervalRule) -> float | None:
    """The interval before anything is known of costs; None where it is one of steps."""
    if rule.kind == "steps":
        return None
    return rule.every_seconds if rule.kind == "seconds" else rule.bounded(rule.every_seconds)
