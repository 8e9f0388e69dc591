"""The interface of a tracker, and what it is given of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import PROBE_NAMES
from jobs.run.validation_rows import VALIDATION_NAMES

_ROW_FIGURES = ("epoch", "loss", "learning_rate", "world_size", "data_wait_seconds", *VALIDATION_NAMES)


@dataclass(frozen=True)
class Point:
    """Figures of one step, by the names that history and metrics have."""

    step: int
    at_seconds: float
    """Unix time."""
    figures: Mapping[str, float]

    @classmethod
    def of_row(
        cls, row: Mapping[str, Any], at_seconds: float, global_batch_size: int, gradient_norm: float | None = None
    ) -> Point:
        """The figures of a history row.

        Args:
            row: Of the step.
            at_seconds: When it was done, or read.
            global_batch_size: Images in a step.
            gradient_norm: Before clipping, which the history does not keep; left out if it is not finite.
        """
        figures = {name: float(row[name]) for name in _ROW_FIGURES if row.get(name) is not None}
        if row.get("step_seconds"):
            figures["images_per_second"] = global_batch_size / row["step_seconds"]
        if gradient_norm is not None and math.isfinite(gradient_norm):
            figures["gradient_norm"] = gradient_norm
        return cls(int(row["step"]), at_seconds, figures)

    @classmethod
    def of_probe(cls, event: Mapping[str, Any]) -> Point:
        """The accuracies of a probe's event."""
        figures = {f"probe_{name}": float(event[name]) for name in PROBE_NAMES}
        return cls(int(event["step"]), float(event["at_seconds"]), figures)


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker is to know it."""

    id: str
    """Made once, and kept in the run directory: the run is the one that has it, whoever drives it."""
    directory: RunDirectory
    recipe: Mapping[str, Any]
    """Flat: `model.<field>`."""
    environ: Mapping[str, str]
    """Variables of the trackers, as the user's shell had them."""
    after_step: int
    """Its figures up to there were sent."""


class Tracker(Protocol):
    """A run that is open in a tracker. Every method may wait for the network, and raise whatever the library does.

    One that has raised is left; the next one is opened with what was sent by then.
    """

    last_step: int | None
    """Up to where the tracker itself says that it has the run's figures; None: it cannot say."""

    def send(self, points: Sequence[Point], last_step: int, log: str) -> None:
        """Add figures and replace the run's notes.

        Args:
            points: At most `CHUNK_POINTS`; those of probes may be of any step.
            last_step: Up to where the tracker then has the figures of all steps.
            log: The newest events, as a list in Markdown; empty: as it was.
        """
        ...

    def end(self, outcome: str) -> None:
        """Note that the run is `finished`, `stopped` or `failed`, and wait until all is there."""
        ...

    def leave(self) -> None:
        """Free what it holds in this process; the run is opened anew."""
        ...


@dataclass(frozen=True)
class TrackerKind:
    """One of the trackers."""

    open: Callable[[TrackedRun], Tracker]
    """Find the run there, or begin it."""
    forgets: bool
    """Whether a run that is opened anew loses what it has after `after_step`; if not, a step's first figures stay."""


CHUNK_POINTS = 100
"""MLflow takes 1,000 figures in a request."""
