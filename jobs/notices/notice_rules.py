"""Which events of a run are worth a notice: a function of the events alone, so that every driver decides alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NoticeKind = Literal["failed", "finished", "waiting", "restart-loop", "not-finite", "slow"]

LOOP_SECONDS = 3600.0
MOST_RESTARTS = 3
"""Within that time; as the alert ConvmaeRestartLoop has it."""
REPEAT_SECONDS = 3600.0
"""Between two notices of one kind about what happens again and again."""
_RESTARTS = ("restart", "resize")
_BEGINNINGS = ("start", *_RESTARTS)
_NOT_FINITE = "NonFiniteLossError"


@dataclass(frozen=True)
class Notice:
    """What people are notified of."""

    kind: NoticeKind
    at_seconds: float
    """Unix time of its event."""
    attempt: int
    step: int
    reason: str


class NoticeRules:
    """The rules, and what they remember of the events so far."""

    def __init__(self) -> None:
        self._restarted_at: deque[float] = deque(maxlen=MOST_RESTARTS + 1)
        self._noticed_at: dict[NoticeKind, float] = {}
        self._waits = False

    def see(self, event: Mapping[str, Any]) -> Notice | None:
        """Take the next event; the notice that it is worth."""
        kind, at = event["kind"], float(event["at_seconds"])
        found: NoticeKind | None = None
        if kind in _BEGINNINGS:
            self._waits = False
        if kind in _RESTARTS:
            self._restarted_at.append(at)
        if kind == "failed":
            found = "failed"
        elif kind == "finished":
            found = "finished"
        elif kind == "waiting" and not self._waits:
            found, self._waits = "waiting", True
        elif kind in ("skipped", "rollback") or (kind == "restart" and _NOT_FINITE in event.get("reason", "")):
            found = self._unless_repeated("not-finite", at)
        elif kind == "slow":
            found = self._unless_repeated("slow", at)
        elif kind in _RESTARTS and self._is_loop(at):
            found = self._unless_repeated("restart-loop", at)
        if found is None:
            return None
        return Notice(found, at, int(event["attempt"]), int(event["step"]), self._reason(found, event))

    def _is_loop(self, now: float) -> bool:
        return len(self._restarted_at) > MOST_RESTARTS and now - self._restarted_at[0] < LOOP_SECONDS

    def _unless_repeated(self, kind: NoticeKind, now: float) -> NoticeKind | None:
        if now - self._noticed_at.get(kind, -REPEAT_SECONDS) < REPEAT_SECONDS:
            return None
        self._noticed_at[kind] = now
        return kind

    def _reason(self, kind: NoticeKind, event: Mapping[str, Any]) -> str:
        reason = str(event.get("reason") or "")
        if kind == "restart-loop":
            return f"more than {MOST_RESTARTS} restarts within an hour; the last: {reason}"
        return reason
