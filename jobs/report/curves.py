"""Curves of a run as numbers, for charts and comparisons: columns of its history, thinned, and its accuracies.

Without matplotlib, which a comparison on a terminal does not need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.recipe.recipe import Recipe
from jobs.run.accuracy_rows import AccuracyCurve
from jobs.run.probe_rows import ProbeCurve
from jobs.run.step_table import StepTable
from jobs.run.validation_rows import ValidationCurve

Floats = npt.NDArray[np.float64]

CHARTED = ("step", "loss", "learning_rate", "world_size", "step_seconds")
"""Columns of a history that charts show."""
RAW_POINTS = 1800
"""Most points of a series as recorded: a lowest and a highest for each pixel of the wide canvas."""
TREND_POINTS = 120
"""Points of the line of means that is drawn over it."""


@dataclass(frozen=True, eq=False)
class History:
    """Columns over the steps of a run, each (n,), by step."""

    steps: Floats
    losses: Floats
    learning_rates: Floats
    world_sizes: Floats
    step_seconds: Floats
    """NaN if it was not recorded."""
    mfu_ratios: Floats
    """NaN where it is not known."""

    @classmethod
    def of(cls, steps: StepTable, mfu_ratios: Floats | None = None) -> History:
        """Take the columns of steps, but those of skipped ones.

        Args:
            steps: One row a step, by step, with CHARTED columns.
            mfu_ratios: Of the same steps, (n,), as `Utilization` has them; None: not known.
        """
        columns = [steps.numbers(name) for name in CHARTED]
        columns.append(np.full(len(steps), np.nan) if mfu_ratios is None else mfu_ratios)
        is_done = np.isfinite(steps.numbers("loss"))
        return cls(*(columns if is_done.all() else [column[is_done] for column in columns]))

    def __len__(self) -> int:
        return len(self.steps)


def thinned(steps: Floats, values: Floats, points: int) -> tuple[Floats, Floats]:
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
    kept = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), (points - 2) // 2):
        kept |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    chosen = np.array(sorted(kept))
    return steps[chosen], values[chosen]


def trend(steps: Floats, values: Floats, points: int) -> tuple[Floats, Floats]:
    """Means of `points` equal stretches of a series; its values if there are fewer."""
    stretches = min(points, len(steps))
    means = [np.array([part.mean() for part in np.array_split(column, stretches)]) for column in (steps, values)]
    return means[0], means[1]


def speeds(history: History, global_batch_size: int) -> tuple[Floats, Floats]:
    """Images per second over stretches of timed steps: the batch, divided by the mean time of a step."""
    timed = history.step_seconds > 0  # which NaN is not
    steps, seconds = trend(history.steps[timed], history.step_seconds[timed], TREND_POINTS)
    return steps, global_batch_size / seconds


def accuracy_curve(recipe: Recipe, events: Iterable[Mapping[str, Any]], steps: StepTable) -> AccuracyCurve:
    """The accuracies of a run: of a pretraining by its probes, of a fine-tuning on its validation samples.

    Args:
        recipe: Says which.
        events: All of the run.
        steps: Its history, one row a step, with VALIDATION_COLUMNS.
    """
    return ValidationCurve.of(steps.measured().rows()) if recipe.finetune else ProbeCurve.of(events)
