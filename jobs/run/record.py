"""Rows that a live run has yet to write: the tail of its history, the attempt's events, and its quarantine."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.run.directory import HISTORY_PART_STEPS, RunDirectory
from pipeline.printable import printable

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Tail:
    """What had to be written at one moment."""

    attempt: int
    is_new: bool
    """Whether anything was added since the last tail."""
    events: list[Row]
    parts: dict[int, list[Row]]
    """History rows, by the first step of their part."""
    quarantine: list[Row]

    def write(self, run: RunDirectory) -> None:
        """Write it, replacing what earlier tails of the attempt wrote."""
        if not self.is_new:
            return
        for start, rows in self.parts.items():
            run.write_history(self.attempt, start, rows)
        if self.events:
            run.write_events(self.attempt, self.events)
        if self.quarantine:
            run.write_quarantine(self.attempt, self.quarantine)


class RunRecord:
    """Rows of the attempt that is being trained.

    Owns: rows until they are written; parts of the history are dropped when they are full and written.
    Concurrency: none; the monitor calls it under its lock, and writes a `Tail` outside of it.
    Failure: after `touch`, the next tail includes one that could not be written.
    Blocking: never.
    """

    def __init__(self, run: RunDirectory, events: Sequence[Row]) -> None:
        """Continue from what the run directory holds.

        Args:
            run: The run.
            events: All of its events so far.
        """
        self.attempt = run.last_attempt()
        self._events = [event for event in events if event["attempt"] == self.attempt]
        self._parts: dict[int, list[Row]] = {}
        ledger = run.read_quarantine()
        self._quarantine = [row for row in ledger if row["attempt"] == self.attempt]
        self._quarantined = {row["id"] for row in ledger}
        self._is_new = False

    @property
    def quarantined(self) -> int:
        """Number of samples that were found unusable over the whole run."""
        return len(self._quarantined)

    def begin_attempt(self) -> None:
        """Count the next attempt; what was written of the last one stays as it is."""
        self.attempt += 1
        self._events, self._parts, self._quarantine = [], {}, []

    def touch(self) -> None:
        """Have the next tail written even if nothing is added."""
        self._is_new = True

    def add_row(self, row: Row) -> None:
        """Add a step to the history."""
        newest = max(self._parts, default=None)
        if newest is None or len(self._parts[newest]) >= HISTORY_PART_STEPS:
            newest = int(row["step"])
            self._parts[newest] = []
        self._parts[newest].append(row)
        self._is_new = True

    def add_event(self, kind: str, fields: Mapping[str, Any]) -> Row:
        """Add an event that happens now, and return it."""
        event = {"at_seconds": round(time.time(), 3), "attempt": self.attempt, "kind": kind, **fields}
        self._events.append(event)
        self._is_new = True
        logger.info("%s", event)
        return event

    def quarantine(self, rows: Sequence[Row]) -> None:
        """Add samples that were found unusable; each is recorded once per run."""
        for row in rows:
            if row["id"] not in self._quarantined:
                self._quarantined.add(row["id"])
                self._quarantine.append({**row, "attempt": self.attempt})
                self._is_new = True
                logger.warning("sample %s is replaced from now on: %s", row["id"], printable(row["reason"]))

    def tail(self) -> Tail:
        """What is to be written now."""
        is_new, self._is_new = self._is_new, False
        parts = {start: list(rows) for start, rows in self._parts.items()}
        return Tail(self.attempt, is_new, list(self._events), parts, list(self._quarantine))

    def settled(self) -> tuple[int, int]:
        """The part of the history before which none will be written again: attempt and first step."""
        return self.attempt, min(self._parts, default=0)

    def written(self, tail: Tail) -> None:
        """Drop what need not be written again."""
        for start in sorted(tail.parts)[:-1]:  # full, and written
            self._parts.pop(start, None)
