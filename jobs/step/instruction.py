"""What the monitor has the ranks do after a step. It travels as a number with the step's sums."""

from __future__ import annotations

from typing import Literal

Instruction = Literal["", "stop", "pause", "save", "hold"]
"""`stop`: save and end. `pause`: save and stand still, since the group is about to end. `save`: save and continue.
`hold`: keep the state in memory and continue, which rank 0 decides by itself."""

INSTRUCTIONS: tuple[Instruction, ...] = ("", "stop", "pause", "save", "hold")

PAUSE_SECONDS = 120.0
"""For saving before a resize, and for standing still thereafter; then training continues."""


class Instructions:
    """Which one the ranks are given after each step. The monitor's; it locks, and the clock is an argument."""

    def __init__(self) -> None:
        """Have the ranks train."""
        self.stop_reason = ""
        """Why the run is to end; empty while it is not."""
        self._next: Instruction = ""
        self._pause_at: float | None = None
        self.stands_still = False
        """Whether the ranks have saved, and wait to be ended."""

    def begin_attempt(self) -> None:
        """Forget what earlier ranks were to do; a stop holds for the run."""
        self._next, self._pause_at, self.stands_still = "", None, False

    def stop(self, reason: str) -> None:
        """End the run after the current step; the first reason counts."""
        self.stop_reason = self.stop_reason or reason

    def save(self) -> None:
        """Save after the current step."""
        self._next = self._next or "save"

    def pause(self) -> None:
        """Save and stand still, unless the ranks do by now."""
        if not self.stands_still:
            self._next = "pause"

    def pause_at(self, now: float) -> None:
        """Have the ranks pause at a time, whatever they do until then."""
        self._pause_at = now

    def withdraw(self) -> None:
        """Take back what was asked for and is not done yet."""
        self._next = ""

    def paused(self) -> None:
        """Note that the ranks stand still."""
        self._next, self.stands_still = "", True

    def trains(self) -> None:
        """Note that the ranks do not, or no longer."""
        self.stands_still = False

    def saved(self) -> None:
        """Note that the ranks save, which is what they may have been asked for."""
        if self._next == "save":
            self._next = ""

    def after_step(self, now: float, *, save_is_due: bool) -> Instruction:
        """What the ranks should do now that a step is done."""
        if self.stop_reason:
            return "stop"
        if self._pause_at is not None and now >= self._pause_at:
            self._next, self._pause_at = "pause", None
        return self._next or ("save" if save_is_due else "")
