"""Accuracies of a fine-tuning while it trains, as rows of its history hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from jobs.run.accuracy_rows import AccuracyCurve, AccuracyRow

VALIDATION_NAMES = {"validation_top1": "top-1", "validation_top5": "top-5"}
"""For people, by the name that history, heartbeat and metrics have; the second one with more than five classes."""
MAIN_VALIDATION = "validation_top1"
VALIDATION_COLUMNS = ("step", "epoch", *VALIDATION_NAMES, "validation_samples", "validation_plan")
"""Of a history, from which a curve is made."""


class ValidationCurve(AccuracyCurve):
    """Shares of the validation samples whose class is the first, or among the first five, over the steps."""

    names: ClassVar[Mapping[str, str]] = VALIDATION_NAMES
    main: ClassVar[str] = MAIN_VALIDATION

    @classmethod
    def of(cls, history: Iterable[Mapping[str, Any]]) -> ValidationCurve:
        """Take the rows from a run's history, oldest first."""
        return cls.of_rows(_row(row) for row in history if MAIN_VALIDATION in row)


def _row(row: Mapping[str, Any]) -> AccuracyRow:
    accuracies = {name: float(row[name]) for name in VALIDATION_NAMES if name in row}
    # The epoch of a row is that of its batch, which has ended here, but at the end of a run that `max_steps` cuts.
    return AccuracyRow(
        row["step"], row["epoch"] + 1, row.get("validation_plan", ""), row["validation_samples"], accuracies
    )
