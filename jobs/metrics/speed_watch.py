"""Whether a run has become slow, by its own past: the speed of each hundred steps against the median of those before.

Speed is images a second and rank, so a resize is not a slowdown. The first hundred steps of an attempt do not count:
caches are cold. Nor is it one when images get larger: with another size the past is forgotten.
"""

from __future__ import annotations

import statistics

BLOCK_STEPS = 100
LEAST_BLOCKS = 5
"""Of the past, before anything is called slow."""
SLOW_RATIO = 0.5
FAST_RATIO = 0.75
"""Of the median; a run that was slow is so until it is above this."""


class SpeedWatch:
    """The speeds of one run while a monitor lives. No thread; the monitor calls it under its lock."""

    def __init__(self, global_batch_size: int) -> None:
        self._global_batch_size = global_batch_size
        self._speeds: list[float] = []
        self._is_slow = False
        self._step_flops = 0.0
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """Leave out the steps that were not a block yet, and the next block."""
        self._steps, self._seconds, self._is_first = 0, 0.0, True

    def step_done(self, step_seconds: float, world_size: int, step_flops: float) -> str:
        """Take a finished step.

        Args:
            step_seconds: Of the slowest rank.
            world_size: Ranks that did it.
            step_flops: Operations of the model for it; others mean images of another size.

        Returns:
            Why the run is slow now, at the end of the block with which it became so; else empty.
        """
        if step_flops != self._step_flops:
            self._speeds, self._is_slow, self._step_flops = [], False, step_flops
            self.begin_attempt()
        self._steps += 1
        self._seconds += step_seconds
        if self._steps < BLOCK_STEPS or self._seconds <= 0:
            return ""
        speed = BLOCK_STEPS * self._global_batch_size / self._seconds / world_size
        is_first, self._is_first = self._is_first, False
        self._steps, self._seconds = 0, 0.0
        return "" if is_first else self._judged(speed)

    def _judged(self, speed: float) -> str:
        """A slow block is not part of the past, which it would make slower."""
        if len(self._speeds) < LEAST_BLOCKS:
            self._speeds.append(speed)
            return ""
        usual = statistics.median(self._speeds)
        was_slow = self._is_slow
        self._is_slow = speed < (FAST_RATIO if was_slow else SLOW_RATIO) * usual
        if not self._is_slow:
            self._speeds.append(speed)
            return ""
        if was_slow:
            return ""
        return f"{speed:.1f} images/s and rank over {BLOCK_STEPS} steps, {speed / usual:.0%} of the usual {usual:.1f}"
