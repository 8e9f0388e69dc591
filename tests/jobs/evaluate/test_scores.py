"""Scores against known values, scikit-learn's metrics and statistics by other means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from jobs.evaluate.scores import NO_CLASS, RANKS, Accuracy, Scores, ranked
from jobs.run.intervals import wilson_interval

NAMES = tuple("abcdefg")


def scores(labels: list[int], ranking: list[list[int]], names: tuple[str, ...] = NAMES) -> Scores:
    rows = [row + [NO_CLASS] * (RANKS - len(row)) for row in ranking]
    return Scores("knn", {"k": 10}, names, np.array(labels), np.array(rows))


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [
        # Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 1 - 0.1170, 1.0),
    ],
)
def test_the_interval_has_the_published_ends(correct: int, samples: int, low: float, high: float) -> None:
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("correct", "samples"), [(0, 1), (1, 1), (3, 7), (499, 2000), (9_999, 10_000)])
def test_the_interval_is_that_of_scipy(correct: int, samples: int) -> None:
    expected = binomtest(correct, samples).proportion_ci(0.95, method="wilson")

    assert wilson_interval(correct, samples) == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-15)


@given(st.integers(1, 10**6), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_the_ends_of_the_interval_are_where_the_score_test_just_accepts(samples: int, share: float) -> None:
    correct = round(share * samples)
    for end in wilson_interval(correct, samples):
        if 0 < end < 1:
            z = (correct / samples - end) / np.sqrt(end * (1 - end) / samples)
            assert abs(z) == pytest.approx(1.959964, rel=1e-4)
        assert 0 <= end <= 1


def test_figures_are_those_of_the_rankings() -> None:
    found = scores([0, 0, 1, 2, 6], [[0, 1], [1, 0], [1], [0, 1, 3, 4, 5], [5, 6]])

    assert (found.top1, found.top5) == (Accuracy(2, 5), Accuracy(4, 5))
    assert found.per_class == [Accuracy(1, 2), Accuracy(1, 1), Accuracy(0, 1), *[Accuracy(0, 0)] * 3, Accuracy(0, 1)]
    predicted = found.ranking[:, 0]
    assert (found.confusion == confusion_matrix(found.labels, predicted, labels=range(7))).all()
    report = found.to_json()
    assert report["per_class"][3] == {"class": "d", "accuracy": None, "interval": None, "correct": 0, "samples": 0}
    assert report["confusion"][0][:2] == [1, 1]


def test_the_best_five_of_five_classes_say_nothing() -> None:
    assert scores([0], [[0, 1, 2, 3, 4]], NAMES[:5]).top5 is None


def test_ranks_follow_the_scores_and_leave_out_what_has_none() -> None:
    found = ranked(np.array([[0.1, 0.9, 0.9, 0.0, 0.5, 0.2, 0.3], [-np.inf, 1, -np.inf, 2, *[-np.inf] * 3]]))

    assert found.tolist() == [[1, 2, 4, 6, 5], [3, 1, NO_CLASS, NO_CLASS, NO_CLASS]]
    assert ranked(np.array([[0.0, 1.0]])).tolist() == [[1, 0, NO_CLASS, NO_CLASS, NO_CLASS]]
