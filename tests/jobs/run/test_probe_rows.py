from __future__ import annotations

import pytest
from probe_events import probe_event, probe_events

from jobs.errors import RunError
from jobs.run.accuracy_text import accuracy_text
from jobs.run.probe_rows import ProbeCurve
from jobs.run.rows import checked


def test_a_curve_is_by_step_however_late_each_probe_came() -> None:
    events = probe_events({40: 0.6, 0: 0.3, 20: 0.7, 4: 0.2})

    curve = ProbeCurve.of([{"kind": "start", "step": 0}, *events])

    assert [row.step for row in curve.rows] == [0, 4, 20, 40]
    assert curve.control and curve.control.accuracies["knn_20"] == 0.3
    assert curve.newest and (curve.newest.step, curve.newest.epoch) == (40, 10)
    best = curve.best("knn_20")
    assert best and best.step == 20
    low, high = curve.newest.interval("knn_20")
    assert low == pytest.approx(0.5308, abs=1e-4) and high == pytest.approx(0.6654, abs=1e-4)  # 120 of 200, by Wilson


def test_rows_on_other_samples_are_another_curve() -> None:
    events = [*probe_events({0: 0.3, 4: 0.4}, "old"), *probe_events({8: 0.5})]

    curve = ProbeCurve.of(events)

    assert [row.step for row in curve.rows] == [8]
    assert curve.control is None


def test_before_the_first_probe_of_trained_weights_there_is_nothing_to_compare() -> None:
    for curve in (ProbeCurve.of([]), ProbeCurve.of(probe_events({0: 0.3}))):
        assert curve.newest is None and curve.best("linear") is None


@pytest.mark.parametrize(
    ("field", "value"), [("knn_20", 1.5), ("knn_10", "high"), ("linear", None), ("tested", 0), ("plan", None)]
)
def test_an_event_that_is_no_probe_is_refused_when_it_is_read(field: str, value: object) -> None:
    event = probe_event(4, 0.5)
    assert checked("events", event, "here") == event

    damaged = {**event, field: value}
    if value is None:
        del damaged[field]
    with pytest.raises(RunError, match=field):
        checked("events", damaged, "here")


def test_the_status_names_newest_and_control() -> None:
    control = {"knn_10": 0.25, "knn_20": 0.26, "linear": 0.3}
    newest = {"knn_10": 0.351, "knn_20": 0.36, "linear": 0.42}

    assert accuracy_text({}) == ""
    before = "kNN, k = 10: 25.0%, kNN, k = 20: 26.0%, linear probe: 30.0% before training"
    assert accuracy_text({"probe_control": control, "probe_accuracies": {}}) == before
    text = accuracy_text({"probe_control": control, "probe_accuracies": newest, "probe_epoch": 20})
    assert text == f"kNN, k = 10: 35.1%, kNN, k = 20: 36.0%, linear probe: 42.0% after epoch 20; {before}"
