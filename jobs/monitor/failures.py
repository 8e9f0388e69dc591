"""The failures of a run, as its monitor knows them, and when they are reason enough to give it up."""

from __future__ import annotations

from jobs.monitor.failure_cause import Remedy, failure_cause


class Failures:
    """The newest failure, and how many there were in a row. The monitor's; it locks, and the clock is an argument."""

    def __init__(self, most_without_progress: int) -> None:
        """Begin a driver's life.

        Args:
            most_without_progress: Failures in a row without a new checkpoint that a run survives.
        """
        self.reason = ""
        """Of the newest; empty since an attempt began."""
        self.failed_at: float | None = None
        """Unix seconds."""
        self.cause = ""
        """What ends the attempt, where that is known better than from the errors of its ranks."""
        self._most = most_without_progress
        self._in_a_row = 0
        self._label = ""

    def allow(self, most_without_progress: int) -> None:
        """Survive another number of failures in a row."""
        self._most = most_without_progress

    def begin_attempt(self) -> None:
        """Forget the newest; the count holds until there is a checkpoint."""
        self.reason = self.cause = self._label = ""
        self.failed_at = None

    def know_cause(self, label: str, text: str) -> None:
        """Note what ends the attempt before the errors of its ranks say so, or in their place."""
        self._label, self.cause = label, text
        if self.reason:
            self.reason = text

    def add(self, error: str, now: float) -> str:
        """Note that the attempt ended with `error`, in one line; returns a label with few values for it."""
        self.reason = self.cause or error  # what the others died of
        self.failed_at = now
        self._in_a_row += 1
        return self._label or failure_cause(self.reason)

    def progressed(self) -> None:
        """Note a new checkpoint."""
        self._in_a_row = 0

    def verdict(self, remedy: Remedy, *, has_trained: bool) -> str:
        """Why to give the run up after the newest; empty to restart it."""
        if remedy == "none" or (remedy == "restart after progress" and not has_trained):
            return self.reason
        if self._in_a_row > self._most:
            return f"{self._in_a_row} failures without a new checkpoint; the last: {self.reason}"
        return ""
