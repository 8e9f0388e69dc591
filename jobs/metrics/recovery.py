"""Recovery: the time between the last step of an attempt and the first of the next, by phase."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("detect", "start", "load", "build", "first_step")


@dataclass
class Recovery:
    """Moments of one restart, in Unix seconds; None if a moment was not recorded."""

    last_step_at: float | None
    """Of the attempt before."""
    failed_at: float | None
    """The controller reported a failure; None after a resize or the death of a driver."""
    started_at: float
    """Rank 0 of the new attempt runs, and its process group is initialised."""
    began_at: float
    """It has opened the data set and fetched the checkpoint."""
    restored_at: float | None = None
    """Its engine holds the checkpoint."""

    def seconds(self, first_step_at: float) -> dict[str, float]:
        """Seconds in each phase, and `down` in all; a phase whose end was not recorded is part of the next.

        Detect: until the failure was reported. Start: until rank 0 runs (end of the old group, placement and start of
        workers, process group). Load: until the checkpoint is on local disk. Build: until the engine holds it. First
        step: its batch, forward, backward and update.

        Args:
            first_step_at: When the first step of the new attempt was done.
        """
        ends = (self.failed_at, self.started_at, self.began_at, self.restored_at, first_step_at)
        first = self.last_step_at or self.failed_at or self.started_at
        spent, before = {}, first
        for phase, end in zip(PHASES, ends, strict=True):
            if end is not None:
                spent[phase] = round(max(0.0, end - before), 3)  # clocks of two hosts may differ
                before = max(before, end)
        return {"down": round(max(0.0, first_step_at - first), 3), **spent}
