"""Curves of a run as numbers, for charts and comparisons: columns of its history, thinned, and its accuracies.

Without matplotlib, which a comparison on a terminal does not need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jobs.recipe.recipe import Recipe
from jobs.run.accuracy_rows import AccuracyCurve
from jobs.run.probe_rows import ProbeCurve
from jobs.run.stored_steps import StoredSteps
from jobs.run.validation_rows import ValidationCurve

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64] | Floats
Series = tuple[Steps, Floats]
"""Steps and values, (n,) each."""

CHARTED = ("step", "loss", "learning_rate", "world_size", "step_seconds")
"""Columns of a history that charts show."""
RAW_POINTS = 1800
"""Most points of a series as recorded: a lowest and a highest for each pixel of the wide canvas."""
TREND_POINTS = 120
"""Points of the line of means that is drawn over it."""
FINAL_SHARE = 0.02
"""Of a run's steps: the last ones, whose mean loss is its final loss."""


class Columns(Protocol):
    """Steps, one row a step, by step: a table, or files that are decoded a column at a time."""

    def __len__(self) -> int: ...

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """(n,)."""

    def numbers(self, name: str) -> Floats:
        """Another column, (n,); NaN where a row has none."""


@dataclass(frozen=True, eq=False)
class History:
    """The steps of a run as they are drawn, but for skipped ones."""

    count: int
    """Steps."""
    losses: Series
    """Thinned, as are the next two: with the first and the last step and each extreme."""
    learning_rates: Series
    world_sizes: Series
    mean_losses: Series
    """Of stretches, as are the next two."""
    mean_step_seconds: Series
    """Of steps that were timed; empty where none was."""
    mean_mfu_ratios: Series
    """Of steps whose MFU is known; empty where none is."""
    final_loss: float
    """Mean of the last FINAL_SHARE of the steps; NaN without one."""

    @classmethod
    def of(cls, steps: Columns, mfu_ratios: Floats | None = None) -> History:
        """Reduce the columns of steps, one after the other: all at once they take 48 bytes a step.

        Args:
            steps: With CHARTED columns.
            mfu_ratios: Of the same steps, (n,); None: not known.
        """
        losses = steps.numbers("loss")
        is_done = np.isfinite(losses)
        done = slice(None) if is_done.all() else is_done
        places, losses = steps.steps[done], losses[done]
        last = max(1, round(len(places) * FINAL_SHARE))
        final_loss = float(np.mean(losses[-last:])) if len(losses) else math.nan
        of_losses = thinned(places, losses, RAW_POINTS), trend(places, losses, TREND_POINTS)
        del losses
        ratios = np.full(len(places), np.nan) if mfu_ratios is None else mfu_ratios[done]
        return cls(
            count=len(places),
            losses=of_losses[0],
            learning_rates=thinned(places, steps.numbers("learning_rate")[done], RAW_POINTS // 6),
            world_sizes=thinned(places, steps.numbers("world_size")[done], RAW_POINTS // 3),
            mean_losses=of_losses[1],
            mean_step_seconds=_trend_where(places, seconds := steps.numbers("step_seconds")[done], seconds > 0),
            mean_mfu_ratios=_trend_where(places, ratios, np.isfinite(ratios)),
            final_loss=final_loss,
        )

    def __len__(self) -> int:
        return self.count

    @property
    def last_step(self) -> float:
        """Of at least one."""
        return float(self.losses[0][-1])

    @property
    def last_loss(self) -> float:
        """Of at least one step."""
        return float(self.losses[1][-1])


def thinned(steps: Steps, values: Floats, points: int) -> Series:
    """Thin a series without losing the first point, the last, or any extreme of the curve.

    The steps are cut into equal stretches, of each of which the lowest and the highest value are kept.

    Args:
        steps: (n,) ascending.
        values: (n,).
        points: Most points to keep, at least 4.

    Returns:
        Steps and values, at most `points` of each.
    """
    if len(steps) <= points:
        return steps, values
    kept, first = {0, len(steps) - 1}, 0
    for stretch in np.array_split(values, (points - 2) // 2):
        kept |= {first + int(stretch.argmin()), first + int(stretch.argmax())}
        first += len(stretch)
    chosen = np.array(sorted(kept))
    return steps[chosen], values[chosen]


def trend(steps: Steps, values: Floats, points: int) -> Series:
    """Means of `points` equal stretches of a series; its values if there are fewer."""
    if not len(steps):
        return steps, values
    stretches = min(points, len(steps))
    means = [np.array([part.mean() for part in np.array_split(column, stretches)]) for column in (steps, values)]
    return means[0], means[1]


def _trend_where(steps: Steps, values: Floats, is_known: npt.NDArray[np.bool_]) -> Series:
    known = slice(None) if is_known.all() else is_known
    return trend(steps[known], values[known], TREND_POINTS)


def speeds(history: History, global_batch_size: int) -> Series:
    """Images per second over stretches of timed steps: the batch, divided by the mean time of a step."""
    steps, seconds = history.mean_step_seconds
    return steps, global_batch_size / seconds


def accuracy_curve(recipe: Recipe, events: Iterable[Mapping[str, Any]], steps: StoredSteps) -> AccuracyCurve:
    """The accuracies of a run: of a pretraining by its probes, of a fine-tuning on its validation samples.

    Args:
        recipe: Says which.
        events: All of the run.
        steps: Its history, one row a step, by step, with VALIDATION_COLUMNS.
    """
    if not recipe.finetune:
        return ProbeCurve.of(events)
    return ValidationCurve.of(row for block in steps.blocks() for row in block.measured().rows())
