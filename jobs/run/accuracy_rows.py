"""Accuracies of a run over its steps, whoever measured them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from jobs.run.intervals import wilson_interval


@dataclass(frozen=True)
class AccuracyRow:
    """The accuracies at one step."""

    step: int
    """0: before training."""
    epoch: int
    plan: str
    """Digest of what is learned from and tested on: rows of one plan compare."""
    tested: int
    """Test samples."""
    accuracies: Mapping[str, float]
    """Shares of them, by the names of the curve."""

    def interval(self, name: str) -> tuple[float, float]:
        """That contains the accuracy on all such samples with 95 % confidence."""
        return wilson_interval(round(self.accuracies[name] * self.tested), self.tested)


@dataclass(frozen=True)
class AccuracyCurve:
    """The accuracies over the steps of a run that compare with the newest: those of its plan."""

    names: ClassVar[Mapping[str, str]]
    """Of what is measured, for people, by the name that records, heartbeat and metrics have."""
    main: ClassVar[str]
    """Named where there is room for one."""

    rows: tuple[AccuracyRow, ...] = ()
    """By step; of a step that was measured twice, the later one."""

    @classmethod
    def of_rows(cls, rows: Iterable[AccuracyRow]) -> Self:
        """Choose those that compare with the newest, given the oldest first."""
        found = list(rows)
        by_step = {row.step: row for row in found if row.plan == found[-1].plan}
        return cls(tuple(by_step[step] for step in sorted(by_step)))

    @property
    def shown(self) -> Mapping[str, str]:
        """Names of what was measured at every step."""
        return {name: text for name, text in self.names.items() if all(name in row.accuracies for row in self.rows)}

    @property
    def control(self) -> AccuracyRow | None:
        """Before the first step: random weights, unless the run starts from others."""
        return self.rows[0] if self.rows and self.rows[0].step == 0 else None

    @property
    def trained(self) -> tuple[AccuracyRow, ...]:
        """All but the control."""
        return self.rows[1:] if self.control else self.rows

    @property
    def newest(self) -> AccuracyRow | None:
        """Of the most steps; None while there is only the control."""
        return self.trained[-1] if self.trained else None

    def best(self, name: str) -> AccuracyRow | None:
        """The row with the highest accuracy by one name, the earliest of equal ones; None as for `newest`."""
        return max(self.trained, key=lambda row: row.accuracies[name], default=None)
