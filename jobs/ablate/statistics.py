"""Means and deviations over seeds, and whether they agree with what others have found.

Deviations are those of a sample (n - 1). Two variants are compared by the differences of runs of the same seed, which
see the same images in the same order; intervals are Student's, of 95 %. Of one seed nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean, stdev
from typing import Literal

from jobs.ablate.spec import Statement

Verdict = Literal["agrees", "agrees in part", "contradicts", "undecided", "not measured"]
Seeded = Mapping[int, float]
"""A figure of each seed, in percent."""

# Of Student's distribution by its degrees of freedom, from 1: 97.5 % lie below. Beyond 30 the last is a little wide.
_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    deviation: float | None
    """None of a single one."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None without values."""
        if not values:
            return None
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    @property
    def half_interval(self) -> float | None:
        """Half of the mean's interval of 95 %; None of a single value."""
        if self.deviation is None:
            return None
        quantile = _QUANTILES[min(self.count - 1, len(_QUANTILES)) - 1]
        return quantile * self.deviation / math.sqrt(self.count)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The mean's interval of 95 %; None of a single value."""
        half = self.half_interval
        return None if half is None else (self.mean - half, self.mean + half)

    def text(self, form: str = ".1f") -> str:
        """`36.2 ± 0.4`, or the only value."""
        return f"{self.mean:{form}}" + ("" if self.deviation is None else f" ± {self.deviation:{form}}")


def difference(low: Seeded, high: Seeded) -> Spread | None:
    """By how much one is above another, over the seeds that both have."""
    return Spread.of([high[seed] - low[seed] for seed in sorted(low.keys() & high.keys())])


@dataclass(frozen=True)
class Comparison:
    """What a statement says beside what was measured."""

    statement: Statement
    verdict: Verdict
    figures: str
    """For people."""


def compared(statement: Statement, measured: Mapping[str, Seeded]) -> Comparison:
    """Compare a statement with figures.

    Args:
        statement: About variants.
        measured: Of each variant, in percent; variants may be missing.
    """
    figures = [measured.get(variant, {}) for variant in statement.variants]
    if not all(figures):
        missing = [name for name, values in zip(statement.variants, figures, strict=True) if not values]
        return Comparison(statement, "not measured", f"no figure of {', '.join(missing)}")
    if statement.rising:
        return _rising(statement, figures)
    return _similar(statement, figures)


def _rising(statement: Statement, figures: Sequence[Seeded]) -> Comparison:
    means = [fmean(values.values()) for values in figures]
    gain = difference(figures[0], figures[-1])
    shown = " → ".join(f"{mean:.1f}" for mean in means)
    if gain is None:
        return Comparison(statement, "undecided", f"{shown}; no seed in common")
    in_order = all(low < high for low, high in pairwise(means))
    verdict: Verdict = "undecided"
    if gain.interval is not None:
        low, high = gain.interval
        if low > 0:
            verdict = "agrees" if in_order else "agrees in part"
        elif high < 0:
            verdict = "contradicts"
    return Comparison(statement, verdict, f"{shown}; {_gain_text(gain)}")


def _similar(statement: Statement, figures: Sequence[Seeded]) -> Comparison:
    shown = ", ".join(f"{fmean(values.values()):.1f}" for values in figures)
    gains = [difference(a, b) for a, b in combinations(figures, 2)]
    if any(gain is None or gain.interval is None for gain in gains):
        return Comparison(statement, "undecided", f"{shown}; too few seeds for an interval")
    intervals = [gain.interval for gain in gains if gain is not None and gain.interval is not None]
    most = statement.within
    verdict: Verdict = "undecided"
    if all(-most <= low and high <= most for low, high in intervals):
        verdict = "agrees"
    elif any(low > most or high < -most for low, high in intervals):
        verdict = "contradicts"
    widest = max((gain for gain in gains if gain is not None), key=lambda gain: abs(gain.mean))
    return Comparison(statement, verdict, f"{shown}; at most {_gain_text(widest)}, within {most:g} is asked for")


def _gain_text(gain: Spread) -> str:
    half = gain.half_interval
    if half is None:
        return f"{gain.mean:+.1f} points in one seed"
    return f"{gain.mean:+.1f} ± {half:.1f} points (95 %, {gain.count} seeds)"
