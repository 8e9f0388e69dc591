"""Accuracies of a run's encoder over its steps, as its events hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from jobs.run.accuracy_rows import AccuracyCurve, AccuracyRow

PROBE_EVENT = "probe"
PROBE_NAMES = {"knn_10": "kNN, k = 10", "knn_20": "kNN, k = 20", "linear": "linear probe"}
"""For people, by the name that events, heartbeat and metrics have."""
MAIN_PROBE = "knn_20"
"""Named where there is room for one."""


class ProbeCurve(AccuracyCurve):
    """Top-1 of the probes over the steps of a pretraining."""

    names: ClassVar[Mapping[str, str]] = PROBE_NAMES
    main: ClassVar[str] = MAIN_PROBE

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> ProbeCurve:
        """Take the rows from a run's events, oldest first."""
        return cls.of_rows(_row(event) for event in events if event["kind"] == PROBE_EVENT)


def _row(event: Mapping[str, Any]) -> AccuracyRow:
    accuracies = {name: float(event[name]) for name in PROBE_NAMES}
    return AccuracyRow(event["step"], event["epoch"], event["plan"], event["tested"], accuracies)
