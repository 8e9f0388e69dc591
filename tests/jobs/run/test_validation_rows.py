from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import RunError
from jobs.run.accuracy_text import accuracies_text
from jobs.run.rows import checked
from jobs.run.validation_rows import ValidationCurve

ROW = {"step": 4, "epoch": 0, "loss": 0.5, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}


def measured(step: int, top1: float, plan: str = "a plan", **more: float) -> dict[str, Any]:
    samples = {"validation_samples": 200, "validation_plan": plan}
    return {**ROW, "step": step, "epoch": step // 4 - 1, "validation_top1": top1, **more, **samples}


def test_a_curve_is_of_the_steps_that_were_measured() -> None:
    curve = ValidationCurve.of([measured(4, 0.3), {**ROW, "step": 5}, measured(8, 0.6), measured(12, 0.4)])

    assert [(row.step, row.epoch, row.accuracies["validation_top1"]) for row in curve.rows] == [
        (4, 1, 0.3),
        (8, 2, 0.6),
        (12, 3, 0.4),
    ]
    best = curve.best("validation_top1")
    assert best and best.step == 8
    low, high = best.interval("validation_top1")
    assert low == pytest.approx(0.5308, abs=1e-4) and high == pytest.approx(0.6654, abs=1e-4)  # 120 of 200, by Wilson
    assert curve.control is None


def test_rows_on_other_samples_are_another_curve() -> None:
    older = {name: value for name, value in measured(4, 0.3).items() if name != "validation_plan"}

    assert [row.step for row in ValidationCurve.of([older, measured(8, 0.6)]).rows] == [8]
    assert [row.step for row in ValidationCurve.of([older, {**older, "step": 8}]).rows] == [4, 8]
    assert ValidationCurve.of([ROW]).newest is None


def test_top_5_is_shown_where_it_was_measured() -> None:
    among = {"validation_top5": 0.9}

    assert list(ValidationCurve.of([measured(4, 0.3)]).shown) == ["validation_top1"]
    assert list(ValidationCurve.of([measured(4, 0.3, **among)]).shown.values()) == ["top-1", "top-5"]
    assert accuracies_text(measured(4, 0.3, **among)) == "top-1: 30.0%, top-5: 90.0%"


@pytest.mark.parametrize(
    ("field", "value"),
    [("validation_top1", 1.5), ("validation_top5", "all"), ("validation_samples", 0), ("validation_samples", None)],
)
def test_a_row_whose_accuracy_is_none_is_refused_when_it_is_read(field: str, value: object) -> None:
    row = measured(4, 0.3)
    assert checked("history", row, "here") == row

    damaged = {**row, field: value}
    if value is None:
        del damaged[field]
    with pytest.raises(RunError, match=field):
        checked("history", damaged, "here")
