"""Accuracies of a run's encoder over its steps, as its events hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.run.intervals import wilson_interval

PROBE_EVENT = "probe"
PROBE_NAMES = {"knn_10": "kNN, k = 10", "knn_20": "kNN, k = 20", "linear": "linear probe"}
"""For people, by the name that events, heartbeat and metrics have."""
MAIN_PROBE = "knn_20"
"""Named where there is room for one."""


@dataclass(frozen=True)
class ProbeRow:
    """The accuracies at one step."""

    step: int
    """0: before training."""
    epoch: int
    plan: str
    """Digest of what is learned from and tested on: rows of one plan compare."""
    tested: int
    """Test samples."""
    accuracies: Mapping[str, float]
    """Top-1, by the names in PROBE_NAMES."""

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> ProbeRow:
        """Take it from an event of the kind PROBE_EVENT."""
        accuracies = {name: float(event[name]) for name in PROBE_NAMES}
        return cls(event["step"], event["epoch"], event["plan"], event["tested"], accuracies)

    def interval(self, name: str) -> tuple[float, float]:
        """That contains the accuracy on all such samples with 95 % confidence."""
        return wilson_interval(round(self.accuracies[name] * self.tested), self.tested)


@dataclass(frozen=True)
class ProbeCurve:
    """The accuracies over the steps of a run that compare with the newest: those of its plan."""

    rows: tuple[ProbeRow, ...] = ()
    """By step; where a step was probed twice, the later one."""

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> ProbeCurve:
        """Take the rows from a run's events, oldest first."""
        found = [ProbeRow.of(event) for event in events if event["kind"] == PROBE_EVENT]
        by_step = {row.step: row for row in found if row.plan == found[-1].plan}
        return cls(tuple(by_step[step] for step in sorted(by_step)))

    @property
    def control(self) -> ProbeRow | None:
        """Before the first step: random weights, unless the run starts from others."""
        return self.rows[0] if self.rows and self.rows[0].step == 0 else None

    @property
    def trained(self) -> tuple[ProbeRow, ...]:
        """All but the control."""
        return self.rows[1:] if self.control else self.rows

    @property
    def newest(self) -> ProbeRow | None:
        """Of the most steps; None while there is only the control."""
        return self.trained[-1] if self.trained else None

    def best(self, name: str) -> ProbeRow | None:
        """The row with the highest accuracy of a probe, the earliest of equal ones; None as for `newest`."""
        return max(self.trained, key=lambda row: row.accuracies[name], default=None)
