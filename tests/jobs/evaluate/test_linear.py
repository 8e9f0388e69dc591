"""The linear probe against scikit-learn's optimum of the same function."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from jobs.errors import EvaluationError
from jobs.evaluate.encoder import Float32s
from jobs.evaluate.linear import fitted_probe
from jobs.evaluate.scores import Int64s


def samples(count: int, classes: int, seed: int) -> tuple[Float32s, Int64s]:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 12))
    labels = np.arange(count) % classes
    features = centres[labels] + 1.2 * random.normal(size=(count, 12))
    return (features * np.geomspace(1e-3, 1e3, 12) + 7).astype(np.float32), labels


@pytest.mark.parametrize(("classes", "l2"), [(2, 1.0), (5, 1.0), (5, 0.1), (5, 100.0)])
def test_the_optimum_is_that_of_scikit_learn(classes: int, l2: float) -> None:
    train, labels = samples(300, classes, seed=0)
    test, _ = samples(200, classes, seed=1)

    probe = fitted_probe(train, labels, classes, l2)

    scaler = StandardScaler().fit(train.astype(np.float64))
    regression = LogisticRegression(C=1 / l2, solver="newton-cg", tol=1e-12, max_iter=1000)
    regression.fit(scaler.transform(train.astype(np.float64)), labels)
    assert probe.has_converged
    np.testing.assert_allclose(probe.mean, scaler.mean_, rtol=1e-9)
    np.testing.assert_allclose(probe.deviation, scaler.scale_, rtol=1e-9)
    # With two classes scikit-learn has one row: the difference, under half of whose square the two of ours share.
    if classes > 2:
        np.testing.assert_allclose(probe.weight, regression.coef_, atol=5e-5)
        np.testing.assert_allclose(probe.bias, regression.intercept_, atol=5e-5)
        odds = regression.decision_function(scaler.transform(test.astype(np.float64)))
        ordered = np.argsort(-odds, axis=1, kind="stable")[:, :5]
        assert (probe.ranking(test)[:, : ordered.shape[1]] == ordered).mean() > 0.999
    else:
        expected = regression.predict(scaler.transform(test.astype(np.float64)))
        assert (probe.ranking(test)[:, 0] == expected).mean() >= 0.98


def test_a_constant_feature_and_the_order_of_samples_change_nothing() -> None:
    train, labels = samples(120, 3, seed=4)
    plain = fitted_probe(train, labels, 3)
    shuffled = np.random.default_rng(0).permutation(120)
    wider = np.concatenate([train, np.full((120, 1), 0.1, np.float32)], 1)

    again = fitted_probe(wider[shuffled], labels[shuffled], 3)

    np.testing.assert_allclose(again.weight[:, :-1], plain.weight, atol=1e-6)
    assert again.weight[:, -1].abs().max() == 0


def test_classes_that_a_line_separates_are_all_found() -> None:
    train = np.array([[-2.0], [-1.0], [1.0], [2.0]], np.float32)

    assert fitted_probe(train, np.array([0, 0, 1, 1]), 2).ranking(train)[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_without_minimum_is_refused(l2: float) -> None:
    with pytest.raises(EvaluationError, match="--l2: must be a positive number"):
        fitted_probe(*samples(20, 2, seed=0), 2, l2)
