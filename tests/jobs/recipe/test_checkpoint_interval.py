from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.recipe.checkpoint_interval import PRIOR_SECONDS, UPLOADS_APART, Costs, IntervalRule, auto_interval
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.simulation import daly_interval_seconds

HOUR = 3600.0
AUTO = IntervalRule("auto", every_steps=10, every_seconds=600.0, min_seconds=60.0, max_seconds=3600.0)
COSTS = Costs(stall_seconds=1.0, upload_seconds=5.0, restart_seconds=21.0, failures=3, trained_seconds=5.2 * HOUR)


def test_the_rule_is_what_the_recipe_says() -> None:
    recipe = named_recipe("tiny").amended(
        {"checkpoint_interval": "auto", "checkpoint_every_seconds": 90.0, "checkpoint_min_seconds": 2.0}
    )

    assert IntervalRule.of(recipe) == IntervalRule("auto", recipe.checkpoint_every_steps, 90.0, 2.0, 3600.0)


def test_the_interval_is_dalys_of_what_was_measured_and_says_so() -> None:
    seconds, reason = auto_interval(AUTO, COSTS)

    mtbf = (5.2 * HOUR + 3 * 21 + PRIOR_SECONDS) / 4
    assert seconds == pytest.approx(daly_interval_seconds(1.0, mtbf) + 1)
    assert seconds == pytest.approx(math.sqrt(2 * mtbf), rel=0.01)
    assert reason == (
        "every 1m 46s: a save stalls 1 s, 3 failures in 5h 12m of training (one in 1h 33m expected), "
        "a restart costs 21s"
    )


def test_before_anything_was_measured_the_recipes_seconds_hold_within_the_bounds() -> None:
    assert auto_interval(AUTO, None) == (600.0, "every 10m 00s until a checkpoint is committed")
    assert auto_interval(replace(AUTO, max_seconds=300.0), None).seconds == 300


@pytest.mark.parametrize(
    ("changes", "seconds", "why"),
    [
        ({"stall_seconds": 0.0}, 60.0, "checkpoint_min_seconds bounds it"),
        ({"stall_seconds": 0.05, "upload_seconds": 50.0}, 100.0, "an upload takes 50s"),
        ({"stall_seconds": 2000.0}, 3600.0, "checkpoint_max_seconds bounds it"),
        ({"upload_seconds": 4000.0}, 3600.0, "checkpoint_max_seconds bounds it"),
    ],
)
def test_bounds_and_uploads_bound_the_interval_by_name(changes: dict[str, float], seconds: float, why: str) -> None:
    found = auto_interval(AUTO, COSTS._replace(**changes))

    assert found.seconds == seconds
    assert found.reason.endswith(why)


def test_a_run_without_failures_saves_ever_more_rarely() -> None:
    quiet = [COSTS._replace(failures=0, restart_seconds=0.0, trained_seconds=hours * HOUR) for hours in (0, 10, 100)]
    found = [auto_interval(AUTO, costs) for costs in quiet]

    assert [round(seconds) for seconds, _ in found] == [85, 282, 853]
    assert found[1].reason == (
        "every 4m 42s: a save stalls 1 s, no failure in 10h 00m of training (one in 11h 00m expected)"
    )


@given(
    stall=st.floats(0, 300), upload=st.floats(0, 3600), restart=st.floats(0, 600), failures=st.integers(0, 20),
    trained=st.floats(0, 1e7),
)  # fmt: skip
def test_the_interval_keeps_its_bounds_and_grows_with_quiet(
    stall: float, upload: float, restart: float, failures: int, trained: float
) -> None:
    costs = Costs(stall, upload, restart, failures, trained)

    seconds = auto_interval(AUTO, costs).seconds

    assert AUTO.min_seconds <= seconds <= AUTO.max_seconds
    assert seconds >= min(UPLOADS_APART * upload, AUTO.max_seconds)
    assert auto_interval(AUTO, costs._replace(trained_seconds=2 * trained)).seconds >= seconds * (1 - 1e-9)
    failed_once_more = costs._replace(failures=failures + 1, restart_seconds=0.0)
    assert auto_interval(AUTO, failed_once_more).seconds <= seconds * (1 + 1e-9)


@pytest.mark.parametrize(
    ("kind", "steps"), [("steps", 10), ("seconds", 300), ("auto", round(daly_interval_seconds(1.0, HOUR) / 2))]
)
def test_a_simulation_takes_the_interval_in_steps(kind: str, steps: int) -> None:
    rule = IntervalRule(kind, 10, 600.0, 60.0, 3600.0)  # type: ignore[arg-type]

    assert rule.simulated_steps(step_seconds=2.0, stall_seconds=1.0, mtbf_seconds=HOUR) == steps
    assert rule.simulated_steps(step_seconds=1e6, stall_seconds=1.0, mtbf_seconds=HOUR) in (1, 10)
