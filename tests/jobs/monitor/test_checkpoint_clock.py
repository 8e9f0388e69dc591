from __future__ import annotations

from typing import Any

import pytest

from jobs.monitor.checkpoint_clock import REMEMBERED, CheckpointClock
from jobs.recipe.checkpoint_interval import IntervalRule

STEPS = IntervalRule("steps", every_steps=10, every_seconds=100.0, min_seconds=10.0, max_seconds=1000.0)
SECONDS = IntervalRule("seconds", every_steps=10, every_seconds=100.0, min_seconds=10.0, max_seconds=1000.0)
AUTO = IntervalRule("auto", every_steps=10, every_seconds=100.0, min_seconds=10.0, max_seconds=1000.0)
HOUR = 3600.0


def attempt(kind: str = "start") -> dict[str, Any]:
    return {"kind": kind, "step": 0, "steps_redone": 0}


def checkpoint(step: int, stall: float = 1.0, duration: float = 2.0) -> dict[str, Any]:
    return {"kind": "checkpoint", "step": step, "stall_seconds": stall, "duration_seconds": duration}


def recovered(down: float, **fields: float) -> dict[str, Any]:
    return {"kind": "recovered", "step": 1, "down_seconds": down, **fields}


def test_with_steps_nothing_is_ever_due_by_time() -> None:
    clock = CheckpointClock(STEPS, [])

    assert clock.seconds is None
    assert not clock.is_due(0.0)
    assert not clock.is_due(1e9)
    assert clock.decide(failures=9, worker_seconds=10.0, world_size=2) is None


def test_a_save_is_due_an_interval_after_the_first_step_and_until_it_begins() -> None:
    clock = CheckpointClock(SECONDS, [])
    clock.see(attempt())

    assert [clock.is_due(now) for now in (5000.0, 5099.9, 5100.0, 5103.0)] == [False, False, True, True]
    clock.save_began(7, 5104.0)
    assert not clock.is_due(5105.0)


def test_none_is_due_while_one_is_under_way() -> None:
    clock = CheckpointClock(SECONDS, [attempt()])
    clock.is_due(0.0)
    clock.save_began(7, 100.0)

    assert not clock.is_due(1000.0)
    clock.see(checkpoint(3))  # of an earlier save
    assert not clock.is_due(1000.0)
    clock.see(checkpoint(7))

    assert clock.is_due(1000.0)


def test_one_that_failed_is_made_up_for_an_interval_after_it_began() -> None:
    clock = CheckpointClock(SECONDS, [attempt()])
    clock.is_due(0.0)
    clock.save_began(7, 100.0)
    clock.see({"kind": "checkpoint-failed", "step": 7, "reason": "no space"})

    assert [clock.is_due(now) for now in (199.0, 200.0)] == [False, True]


def test_a_new_attempt_frees_what_was_under_way_and_counts_anew() -> None:
    clock = CheckpointClock(SECONDS, [attempt()])
    clock.is_due(0.0)
    clock.save_began(7, 100.0)
    clock.see(attempt("restart"))

    assert [clock.is_due(now) for now in (500.0, 599.0, 600.0)] == [False, False, True]


def test_a_save_for_another_reason_counts() -> None:
    clock = CheckpointClock(SECONDS, [attempt()])
    clock.is_due(0.0)
    clock.save_began(7, 90.0)  # a milestone
    clock.see(checkpoint(7))

    assert [clock.is_due(now) for now in (189.0, 190.0)] == [False, True]


def test_the_first_decision_is_told_and_then_only_those_that_differ() -> None:
    clock = CheckpointClock(AUTO, [attempt()])
    first = clock.decide(failures=0, worker_seconds=0.0, world_size=2)
    assert first is not None
    assert (first.seconds, clock.seconds) == (100.0, 100.0)
    assert "until a checkpoint is committed" in first.reason
    assert clock.decide(failures=0, worker_seconds=0.0, world_size=2) is None

    clock.see(checkpoint(5))
    second = clock.decide(failures=1, worker_seconds=2 * HOUR, world_size=2)

    assert second is not None
    assert clock.seconds == second.seconds == pytest.approx(85, abs=1)  # Young: sqrt(2 * 1 s * 1 h)
    assert clock.decide(failures=1, worker_seconds=2.2 * HOUR, world_size=2) is None
    assert clock.decide(failures=1, worker_seconds=4 * HOUR, world_size=2) is not None


def test_half_the_workers_fail_half_as_often() -> None:
    clock = CheckpointClock(AUTO, [attempt(), checkpoint(5)])
    on_eight = clock.decide(failures=100, worker_seconds=800 * HOUR, world_size=8)
    on_four = clock.decide(failures=100, worker_seconds=800 * HOUR, world_size=4)

    assert on_eight is not None
    assert on_four is not None
    assert on_four.seconds / on_eight.seconds == pytest.approx(2**0.5, rel=0.01)


def test_medians_of_the_newest_saves_and_restarts_count() -> None:
    old = [checkpoint(step, stall=500.0) for step in range(5)]
    new = [checkpoint(step, stall=1.0) for step in range(REMEMBERED - 1)]
    restarts = [recovered(1e6), recovered(20.0, detect_seconds=1.0)]  # the first is a night between two drivers
    clock = CheckpointClock(AUTO, [attempt(), *old, *new, checkpoint(99, stall=90.0), *restarts])

    decision = clock.decide(failures=2, worker_seconds=5 * HOUR, world_size=1)

    assert decision is not None
    assert decision.reason.startswith("every 2m 00s: a save stalls 1 s, 2 failures in 5h 00m of training")
    assert decision.reason.endswith("a restart costs 20s")


def test_a_new_driver_goes_on_with_the_interval_that_was_explained() -> None:
    told = {"kind": "checkpoint-interval", "step": 5, "seconds": 86.0, "reason": "..."}
    clock = CheckpointClock(AUTO, [attempt(), checkpoint(5), told])

    assert clock.seconds == 86.0
    assert clock.decide(failures=1, worker_seconds=HOUR, world_size=1) is None
    assert CheckpointClock(SECONDS, [told]).seconds == 100.0


def test_an_interval_outside_of_new_bounds_is_left() -> None:
    told = {"kind": "checkpoint-interval", "step": 5, "seconds": 9.5, "reason": "..."}
    clock = CheckpointClock(AUTO, [attempt(), checkpoint(5, stall=0.0), told])

    decision = clock.decide(failures=1, worker_seconds=HOUR, world_size=1)

    assert decision is not None
    assert clock.seconds == 10.0
