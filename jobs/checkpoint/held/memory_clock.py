"""After which steps the ranks keep their state in memory: every so many, or so rarely that it costs next to nothing."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal

from jobs.recipe.memory_interval import auto_interval_steps

FIRST_BYTES_PER_SECOND = 1e9
"""At which the first one is taken to be copied, until one was."""
REMEMBERED = 9
"""Newest checkpoints, and steps, whose medians count."""

Every = int | Literal["auto"]
"""Steps between memory checkpoints; 0: none."""


class MemoryClock:
    """The clock of rank 0, whose decision travels to the others with the next step's sums."""

    def __init__(self, every: Every, part_bytes: int) -> None:
        """Begin.

        Args:
            every: As the recipe says.
            part_bytes: Of a rank's part.
        """
        self._every = every
        self._costs: deque[float] = deque([part_bytes / FIRST_BYTES_PER_SECOND], maxlen=REMEMBERED)
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._beside: list[float] = []
        self._newest: int | None = None
        self._lag = 0

    @property
    def interval(self) -> int:
        """Steps from one to the next."""
        if self._every != "auto":
            return self._every
        if not self._steps:
            return REMEMBERED
        return auto_interval_steps(median(self._costs), median(self._steps))

    def stepped(self, seconds: float, *, beside: bool) -> None:
        """Note a step.

        Args:
            seconds: That it took, without what was saved after it.
            beside: Whether a memory checkpoint was under way meanwhile.
        """
        (self._beside if beside else self._steps).append(seconds)

    def is_due(self, step: int) -> bool:
        """Whether to keep the state after this many steps.

        A given number of steps is over when the next one is whole, which thus begins earlier. By itself at least one
        step passes without: it shows how long steps are.
        """
        if self._newest is None:
            self._newest = step - 1
        if self._every == "auto":
            return step - self._newest >= max(self.interval, self._lag + 1)
        return step - self._newest >= max(1, self._every - self._lag)

    def began(self, step: int) -> None:
        """Note that one was begun after `step`."""
        self._newest = step
        self._beside = []

    def ended(self, step: int, stall_seconds: float) -> None:
        """Note that the newest one is whole, or has failed.

        What it cost is what training stood still for it, and by how much the steps beside it were longer than others.

        Args:
            step: Steps done by now.
            stall_seconds: For which training stood still for it.
        """
        self._lag = step - self._newest if self._newest is not None else 0
        slower = sum(self._beside) - len(self._beside) * median(self._steps) if self._steps else 0.0
        self._costs.append(stall_seconds + max(0.0, slower))
