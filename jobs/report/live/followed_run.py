"""A run directory that is read again and again: what cannot change any more is read once.

Of a step 48 bytes are kept. Pictures and faults of samples are read seldom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

from jobs.checkpoint import checkpoint
from jobs.metrics.utilization import with_utilization
from jobs.recipe.recipe import Recipe
from jobs.report.accuracy import accuracy_curve
from jobs.report.charts import History
from jobs.report.reconstruction import RECONSTRUCTIONS_NAME
from jobs.report.reported_run import ReportedRun
from jobs.run.directory import RunDirectory
from jobs.run.validation_rows import MAIN_VALIDATION

T = TypeVar("T")
Row = dict[str, Any]

READERS = 8
"""Files that are read at once."""
SELDOM_SECONDS = 60.0
"""Between two looks at what changes seldom."""


class _Files(Generic[T]):
    """The files of one folder of a run directory; all but the newest are read once."""

    def __init__(self, run: RunDirectory, folder: str) -> None:
        self._run, self._folder = run, folder
        self._kept: dict[str, T] = {}

    def names(self) -> list[str]:
        """Those that there are, oldest first."""
        return self._run.part_names(self._folder)

    def read(self, names: Sequence[str], made: Callable[[list[Row]], T]) -> list[T]:
        """What is made of each, in their order."""
        missing = [name for name in names if name not in self._kept]
        with ThreadPoolExecutor(READERS) as pool:
            new = pool.map(lambda name: made(self._run.read_part(self._folder, name)), missing)
            known = {**self._kept, **dict(zip(missing, new, strict=True))}
        self._kept = {name: known[name] for name in names[:-1]}
        return [known[name] for name in names]


@dataclass(frozen=True, eq=False)
class _Steps:
    """One file of the history."""

    columns: History
    """With NaN for the losses of skipped steps."""
    validations: tuple[Row, ...]
    """Rows that have an accuracy."""

    @classmethod
    def of(cls, rows: list[Row], events: Sequence[Mapping[str, Any]]) -> _Steps:
        numbers = [{**row, "loss": np.nan if row["loss"] is None else row["loss"]} for row in rows]
        validations = tuple(row for row in rows if MAIN_VALIDATION in row)
        return cls(History.of(list(with_utilization(numbers, events))), validations)


class FollowedRun:
    """One run directory. Concurrency: none. Blocking: `read` waits for storage."""

    def __init__(self, run: RunDirectory, clock: Callable[[], float] = time.monotonic) -> None:
        """Read nothing yet.

        Args:
            run: The directory.
            clock: Monotonic seconds.
        """
        self._run, self._clock = run, clock
        self._recipe: Recipe | None = None
        self._events: _Files[list[Row]] = _Files(run, "events")
        self._history: _Files[_Steps] = _Files(run, "history")
        self._looked_at = -SELDOM_SECONDS
        self._picture: bytes | None = None
        self._faults: list[Row] = []

    def read(self, heartbeat: Mapping[str, Any] | None = None) -> ReportedRun:
        """All that a page shows; without the data set's list of skipped images, and without the newest commit.

        Args:
            heartbeat: A newer one than the directory has.

        Raises:
            RunError: There is no such run, or it is damaged.
            StorageError: The store does not answer.
        """
        run = self._run
        self._recipe = self._recipe or run.read_recipe()
        beat = run.read_heartbeat() if heartbeat is None else heartbeat
        names = self._history.names()  # before the events, so that those have the beginning of every attempt
        events = [event for part in self._events.read(self._events.names(), list) for event in part]
        parts = self._history.read(names, lambda rows: _Steps.of(rows, events))
        history = newest_of_each([part.columns for part in parts])
        self._look_seldom()
        return ReportedRun(
            name=run.name,
            url=run.url,
            recipe=self._recipe,
            heartbeat=beat,
            events=events,
            history=history,
            mfu_ratio=mean_mfu_of(history),
            accuracies=accuracy_curve(self._recipe, events, [row for part in parts for row in part.validations]),
            kept_steps=frozenset(checkpoint.committed_steps(run)),
            commit=None,
            faults=self._faults,
            skipped=None,
            picture=self._picture,
        )

    def _look_seldom(self) -> None:
        now = self._clock()
        if now - self._looked_at < SELDOM_SECONDS:
            return
        self._faults = self._run.read_quarantine()
        try:
            self._picture = self._run.storage.read(self._run.path(RECONSTRUCTIONS_NAME))
        except FileNotFoundError:
            self._picture = None
        self._looked_at = now


def newest_of_each(parts: Sequence[History]) -> History:
    """One history of several, oldest first: of a step that was redone the last, without steps that were skipped."""
    columns = {
        field.name: np.concatenate([np.empty(0), *(getattr(part, field.name) for part in parts)])
        for field in fields(History)
    }
    _, places = np.unique(columns["steps"][::-1], return_index=True)
    chosen = len(columns["steps"]) - 1 - places
    chosen = chosen[np.isfinite(columns["losses"][chosen])]
    return History(**{name: column[chosen] for name, column in columns.items()})


def mean_mfu_of(history: History) -> float | None:
    """MFU over all steps that have one: by their time; None where none has."""
    known = np.isfinite(history.mfu_ratios)
    seconds = history.step_seconds[known]
    return float((history.mfu_ratios[known] * seconds).sum() / seconds.sum()) if seconds.sum() > 0 else None
