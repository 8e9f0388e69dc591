"""Nearest neighbours against scikit-learn's, and against a computation sample by sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jobs.errors import EvaluationError
from jobs.evaluate import knn
from jobs.evaluate.encoder import Float32s
from jobs.evaluate.knn import TEMPERATURE, knn_rankings
from jobs.evaluate.scores import NO_CLASS, Int64s


def clusters(count: int, classes: int, seed: int) -> tuple[Float32s, Int64s]:
    """Features that overlap, so that neighbours disagree."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 16))
    labels = random.integers(0, classes, count)
    return (centres[labels] + 1.5 * random.normal(size=(count, 16))).astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 10, 20])
def test_classes_and_their_order_are_those_of_scikit_learn(k: int) -> None:
    train, train_labels = clusters(400, 7, seed=0)
    test, _ = clusters(150, 7, seed=1)

    (found,) = knn_rankings(train, train_labels, test, 7, [k])

    votes = KNeighborsClassifier(k, weights=lambda far: np.exp((1 - far) / TEMPERATURE), metric="cosine")
    shares = votes.fit(train.astype(np.float64), train_labels).predict_proba(test.astype(np.float64))
    assert (found[:, 0] == shares.argmax(1)).all()
    for row, share in zip(found, shares, strict=True):
        ordered = [place for place in np.argsort(-share, kind="stable") if share[place] > 0][:5]
        assert row.tolist() == ordered + [NO_CLASS] * (5 - len(ordered))


def test_several_k_are_those_of_each_alone_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = clusters(90, 4, seed=2)
    test, _ = clusters(33, 4, seed=3)
    together = knn_rankings(train, labels, test, 4, [5, 20])

    monkeypatch.setattr(knn, "CHUNK_SIMILARITIES", 90 * 7)

    for k, found in zip([5, 20], together, strict=True):
        assert (knn_rankings(train, labels, test, 4, [k])[0] == found).all()


def test_of_equally_near_samples_the_first_is_taken_whatever_their_number() -> None:
    train = np.repeat(np.eye(2, dtype=np.float32), [6, 2], axis=0)
    labels = np.array([3, 2, 2, 1, 0, 0, 1, 1])

    found = knn_rankings(train, labels, np.array([[5.0, 0.0]], np.float32), 4, [1, 3, 6, 8])

    assert [row[0].tolist()[:4] for row in found] == [[3, -1, -1, -1], [2, 3, -1, -1], [0, 2, 1, 3], [0, 2, 1, 3]]


def test_votes_are_weighted_by_the_exponential_of_similarity() -> None:
    """Two neighbours at 60 degrees weigh less than one at 0; by number alone they would win."""
    angles = np.array([0, math.pi / 3, -math.pi / 3])
    train = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)

    (found,) = knn_rankings(train, np.array([1, 0, 0]), np.array([[2.0, 0.0]], np.float32), 2, [3])

    assert 2 * math.exp(0.5 / 0.07) < math.exp(1 / 0.07)
    assert found[0, 0] == 1


@pytest.mark.parametrize("k", [0, 4])
def test_fewer_samples_than_neighbours_are_refused(k: int) -> None:
    with pytest.raises(EvaluationError, match=rf"--k: must be from 1 to the 3 train samples, got {k}"):
        knn_rankings(np.eye(3, dtype=np.float32), np.arange(3), np.eye(3, dtype=np.float32), 3, [k])
