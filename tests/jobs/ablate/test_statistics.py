"""Means, deviations and verdicts, with values worked out by hand or by SciPy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from jobs.ablate.spec import Statement
from jobs.ablate.statistics import Spread, compared, difference


def statement(**fields: object) -> Statement:
    return Statement(text="x", source="y", **fields)


def test_mean_and_sample_deviation_over_seeds() -> None:
    spread = Spread.of([36.0, 37.0, 35.0])  # squares of the deviations: 0, 1, 1; divided by 2

    assert spread is not None
    assert (spread.mean, spread.deviation, spread.text()) == (36.0, 1.0, "36.0 ± 1.0")


def test_one_seed_has_no_deviation() -> None:
    spread = Spread.of([36.0])

    assert spread is not None
    assert (spread.deviation, spread.interval, spread.text()) == (None, None, "36.0")
    assert Spread.of([]) is None


@pytest.mark.parametrize("count", [2, 3, 5, 31])
def test_intervals_are_students(count: int) -> None:
    values = [math.sin(number) for number in range(count)]
    spread = Spread.of(values)

    low, high = stats.t.interval(0.95, count - 1, sum(values) / count, stats.sem(values))
    assert spread is not None
    assert spread.interval == pytest.approx((low, high), rel=1e-3)


def test_variants_are_compared_by_seed() -> None:
    gain = difference({0: 10.0, 1: 20.0, 2: 99.0}, {0: 11.0, 1: 21.5})

    assert gain is not None
    assert (gain.mean, gain.count) == (1.25, 2)


@pytest.mark.parametrize(
    ("low", "middle", "high", "verdict"),
    [
        ((10, 11, 12), (12, 13, 14), (15, 16, 17), "agrees"),
        ((10, 11, 12), (16, 17, 18), (15, 16, 17), "agrees in part"),
        ((15, 16, 17), (12, 13, 14), (10, 11, 12), "contradicts"),
        ((10, 11, 12), (11, 12, 13), (9, 12, 14), "undecided"),
        ((10,), (12,), (15,), "undecided"),
        ((10, 11, 12), (), (15, 16, 17), "not measured"),
    ],
)
def test_an_order_is_judged_by_its_ends_and_by_the_means_between(
    low: tuple[int, ...], middle: tuple[int, ...], high: tuple[int, ...], verdict: str
) -> None:
    found = {name: dict(enumerate(map(float, values))) for name, values in zip("abc", (low, middle, high), strict=True)}

    assert compared(statement(rising=("a", "b", "c")), found).verdict == verdict


@pytest.mark.parametrize(
    ("other", "verdict"),
    [((10.1, 11.0, 12.1), "agrees"), ((15.0, 16.0, 17.1), "contradicts"), ((12.0, 10.0, 13.0), "undecided")],
)
def test_likeness_is_judged_by_intervals_within_a_margin(other: tuple[float, ...], verdict: str) -> None:
    found = {"a": {0: 10.0, 1: 11.0, 2: 12.0}, "b": dict(enumerate(other))}

    assert compared(statement(similar=("a", "b"), within=1.0), found).verdict == verdict
