from __future__ import annotations

import json
import random
from typing import Any

import pytest

from jobs.errors import RunError
from jobs.metrics.utilization import GroupCompute, Utilization, mean_mfu
from jobs.run.rows import checked
from jobs.run.step_table import StepTable

EVENT = {"at_seconds": 1.0, "kind": "start", "step": 0, "steps_redone": 0}
TWO = GroupCompute(step_flops=6e12, peak_flops_per_second=20e12, devices="2 x A (data sheet)")
"""A slow and a fast device."""


def row(step: int, attempt: int, world_size: int = 2, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 0.5, "world_size": world_size, "attempt": attempt, **more}


def test_mfu_is_a_steps_operations_over_the_peak_of_all_devices() -> None:
    assert TWO.figures(world_size=2, step_seconds=0.5, step=1) == pytest.approx(
        {"device_flops_per_second": 6e12, "mfu_ratio": 0.6}
    )


def test_without_a_peak_there_is_no_mfu() -> None:
    unknown = GroupCompute(step_flops=6e12, peak_flops_per_second=None, devices="")

    assert unknown.figures(2, 0.5, 1) == {"device_flops_per_second": 6e12}
    assert "peak_flops_per_second" not in unknown.to_json()


@pytest.mark.parametrize(("world_size", "seconds"), [(2, 0.0), (2, -1.0), (0, 1.0), (2, 5e-324)])
def test_a_step_that_took_no_time_has_no_figures(world_size: int, seconds: float) -> None:
    assert TWO.figures(world_size, seconds, 1) == {}


GROWING = GroupCompute(6e12, 20e12, "2 x A (data sheet)", step_flops_from=((1, 3e12), (5, 4e12), (9, 6e12)))
"""Images get larger with the fifth step and with the ninth."""


def test_a_step_is_measured_by_what_images_of_its_size_need() -> None:
    steps = StepTable.of([row(step, 1, step_seconds=1.0) for step in (1, 4, 5, 8, 9, 20)])
    event = json.loads(json.dumps({**EVENT, "attempt": 1, "world_size": 2, **GROWING.to_json()}))

    found = list(Utilization.of(steps, [checked("events", event, "events")]).rows(steps))

    assert GroupCompute.of_attempts([event]) == {1: GROWING}
    assert [each["mfu_ratio"] for each in found] == pytest.approx([0.15, 0.15, 0.2, 0.2, 0.3, 0.3])
    for each in found:
        expected = GROWING.figures(2, 1.0, each["step"])
        assert expected == {name: each[name] for name in ("device_flops_per_second", "mfu_ratio")}


@pytest.mark.parametrize(
    ("step", "total", "steps"),
    [
        (1, 4, 3),
        (3, 10, 1 + 4 * 4 / 3 + 2 * 2),
        (4, 10, 4 * 4 / 3 + 2 * 2),
        (6, 10, 2 + 2 * 1.5),
        (9, 10, 1),
        (10, 10, 0),
    ],
)
def test_the_rest_of_a_run_counts_by_what_its_images_need(step: int, total: int, steps: float) -> None:
    assert GROWING.steps_like(step, total) == pytest.approx(steps)
    assert TWO.steps_like(step, total) == total - step


@pytest.mark.parametrize("faulty", [[], [[1]], [[1, 2e12, 3]], [[1, 0]], [["1", 2e12]], 5, [[1.5, 1e12]]])
def test_an_event_with_odd_operations_is_refused(faulty: Any) -> None:
    event = {**EVENT, "attempt": 1, "world_size": 2, "step_flops": 6e12, "step_flops_from": faulty}

    with pytest.raises(RunError, match="step_flops_from"):
        checked("events", event, "events")


def test_each_row_has_the_figures_of_its_own_attempt_and_older_ones_have_none() -> None:
    one = GroupCompute(step_flops=6e12, peak_flops_per_second=5e12, devices="1 x B (data sheet)")
    events = [
        {**EVENT, "attempt": 1},
        {**EVENT, "attempt": 2, **TWO.to_json()},
        {"at_seconds": 2.0, "attempt": 2, "kind": "finished", "step": 3},
        {**EVENT, "attempt": 3, **one.to_json()},
    ]
    rows = [
        row(1, 1, step_seconds=1.0),
        row(2, 2, step_seconds=1.0),
        row(3, 2),
        row(4, 3, world_size=1, step_seconds=3.0),
    ]

    steps = StepTable.of(rows)
    utilization = Utilization.of(steps, events)
    found = list(utilization.rows(steps))

    assert [each.get("mfu_ratio") for each in found] == [None, pytest.approx(0.3), None, pytest.approx(0.4)]
    assert [each.get("device_flops_per_second") for each in found] == [None, 3e12, None, 2e12]
    assert found[0] == rows[0]
    seconds = steps.numbers("step_seconds")
    assert mean_mfu(utilization.mfu_ratios, seconds) == pytest.approx((0.3 * 1 + 0.4 * 3) / 4)
    assert mean_mfu(Utilization.of(steps, events[:1]).mfu_ratios, seconds) is None


@pytest.mark.parametrize("peak", [None, 7e12, 1e-300])
def test_the_figures_of_many_steps_are_those_of_each_to_the_bit(peak: float | None) -> None:
    compute = GroupCompute(step_flops=61_234_567_890_123, peak_flops_per_second=peak, devices="")
    draw = random.Random(0)
    timed = [(draw.randrange(4), draw.choice([0.0, -1.0, 5e-324, 1e-300, draw.random()])) for _ in range(500)]
    rows = [row(number, 1, world_size=size, step_seconds=taken) for number, (size, taken) in enumerate(timed, 1)]
    steps = StepTable.of(rows)

    found = Utilization.of(steps, [{**EVENT, "attempt": 1, **compute.to_json()}]).rows(steps)

    expected = [
        {**row, **compute.figures(size, taken, row["step"])} for row, (size, taken) in zip(rows, timed, strict=True)
    ]
    assert list(found) == expected
