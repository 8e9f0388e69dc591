"""A run directory that is read again and again: what cannot change any more is read once.

Of a step in a compacted file 33 bytes are kept, as it is stored. Pictures and faults of samples are read seldom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sized
from typing import Any, Generic, TypeVar

from jobs.checkpoint import checkpoint
from jobs.metrics.utilization import mean_mfu, mfu_ratios
from jobs.recipe.recipe import Recipe
from jobs.report.curves import CHARTED, History, accuracy_curve
from jobs.report.reported_run import ReportedRun
from jobs.run.directory import RECONSTRUCTIONS_NAME, RunDirectory
from jobs.run.parts import Parts
from jobs.run.stored_steps import StepFile, StoredSteps
from jobs.run.validation_rows import VALIDATION_COLUMNS

T = TypeVar("T", bound=Sized)
Row = dict[str, Any]

COLUMNS = frozenset({*CHARTED, *VALIDATION_COLUMNS, "attempt"})
"""Of a history that a page shows."""
SELDOM_SECONDS = 60.0
"""Between two looks at what changes seldom."""


class _Files(Generic[T]):
    """The files of one kind of record; all but the newest are read once."""

    def __init__(self, parts: Parts[T]) -> None:
        self._parts = parts
        self._kept: dict[str, T] = {}

    def read(self) -> list[T]:
        """The rows of each, in order."""
        found = self._parts.followed(self._kept)
        self._kept = dict(list(found.items())[:-1])
        return list(found.values())


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
        self._events: _Files[list[Row]] = _Files(run.row_parts("events"))
        self._history: _Files[StepFile] = _Files(run.step_parts(COLUMNS))
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
        parts = self._history.read()  # before the events, so that those have the beginning of every attempt
        events = [event for part in self._events.read() for event in part]
        steps = StoredSteps.of(parts, COLUMNS).latest()
        ratios = mfu_ratios(steps, events)
        self._look_seldom()
        return ReportedRun(
            name=run.name,
            url=run.url,
            recipe=self._recipe,
            heartbeat=beat,
            events=events,
            history=History.of(steps, ratios),
            mfu_ratio=mean_mfu(ratios, steps.numbers("step_seconds")),
            accuracies=accuracy_curve(self._recipe, events, steps),
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
