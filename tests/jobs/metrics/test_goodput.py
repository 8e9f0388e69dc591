from __future__ import annotations

import random
from typing import Any

import pytest

from jobs.metrics.goodput import measured_goodput
from jobs.recipe.simulation import mean_outcome

STEP, STALL, UPLOAD = 2.0, 0.5, 3.0


class Story:
    """Writes the events of a run whose steps take `STEP` seconds."""

    def __init__(self) -> None:
        self.now, self.attempt, self.step, self.saved = 1000.0, 0, 0, 0
        self.events: list[dict[str, Any]] = []

    def add(self, kind: str, **fields: Any) -> None:
        self.events.append({"at_seconds": self.now, "attempt": self.attempt, "kind": kind, **fields})

    def start(self, kind: str = "start", down: float = 0.0, world_size: int = 2, detect: bool = True) -> None:
        """An attempt from the newest checkpoint, whose first step is done `down + STEP` after the last."""
        self.attempt += 1
        redone, self.step = self.step - self.saved, self.saved
        self.now += down
        self.add(kind, step=self.step, world_size=world_size, steps_redone=redone)
        if kind != "start":
            phases = {"detect_seconds": 1.0} if detect else {}
            self.add("recovered", step=self.step + 1, down_seconds=down + STEP, **phases)

    def train(self, steps: int, every: int, step_seconds: float = STEP) -> None:
        for _ in range(steps):
            self.step, self.now = self.step + 1, self.now + step_seconds
            if self.step % every == 0:
                self.saved = self.step
                self.now += STALL
                event = {"attempt": self.attempt, "kind": "checkpoint", "step": self.step}
                times = {"at_seconds": self.now - STALL + UPLOAD, "stall_seconds": STALL, "duration_seconds": UPLOAD}
                self.events.append({**event, **times})


def test_without_failures_only_the_saves_cost() -> None:
    story = Story()
    story.start()
    story.train(100, every=10)

    found = measured_goodput(story.events)

    assert found is not None
    assert found.step_seconds == pytest.approx(STEP)
    assert found.wall_seconds == pytest.approx(100 * STEP + 10 * STALL)
    assert found.ratio == pytest.approx(200 / 205)
    assert (found.steps, found.interval_steps, found.restarts, found.lost_steps) == (100, 10, 0, 0)


def test_restarts_and_lost_steps_cost() -> None:
    story = Story()
    story.start()
    story.train(37, every=10)
    story.start("restart", down=20.0)
    story.train(24, every=10)
    story.start("resize", down=40.0)
    story.train(10, every=10)

    found = measured_goodput(story.events)

    assert found is not None
    assert (found.steps, found.restarts, found.lost_steps) == (60, 2, 7 + 4)
    assert found.restart_seconds == pytest.approx(30.0)
    assert found.wall_seconds == pytest.approx((60 + 11) * STEP + 6 * STALL + 60)
    assert found.ratio == pytest.approx(120 / found.wall_seconds)


def test_what_no_checkpoint_holds_yet_does_not_count() -> None:
    story = Story()
    story.start()
    story.train(39, every=10)
    story.start("restart", down=20.0)
    story.train(9, every=10)

    found = measured_goodput(story.events)

    assert found is not None
    assert (found.steps, found.restarts, found.lost_steps) == (30, 0, 0)


def test_a_night_in_which_the_run_was_stopped_is_not_counted() -> None:
    story = Story()
    story.start()
    story.train(30, every=10)
    story.add("stopped", step=30, reason="asked")
    story.start("restart", down=30_000.0, detect=False)
    story.train(30, every=10)

    found = measured_goodput(story.events)

    assert found is not None
    assert found.wall_seconds == pytest.approx(60 * STEP + 6 * STALL)
    assert (found.restarts, found.restart_seconds) == (0, 0.0)


def test_steps_on_fewer_workers_are_measured_by_those_on_most() -> None:
    story = Story()
    story.start()
    story.train(30, every=10)
    story.start("resize", down=10.0, world_size=1)
    story.train(200, every=10, step_seconds=2 * STEP)

    found = measured_goodput(story.events)

    assert found is not None
    assert found.step_seconds == pytest.approx(STEP)
    assert found.ratio == pytest.approx(0.5, abs=0.08)


def test_steps_with_larger_images_are_measured_by_those_of_their_size() -> None:
    story = Story()
    story.start()
    sizes = {"step_flops": 2e9, "step_flops_from": [[1, 1e9], [71, 2e9], [5001, 3e9]]}
    story.events[-1].update(sizes)
    story.train(70, every=10, step_seconds=1.0)
    story.train(30, every=10, step_seconds=2.5)

    found = measured_goodput(story.events)

    assert found is not None
    assert found.step_seconds == pytest.approx((70 * 1.0 + 30 * 2.5) / 100)
    assert found.ratio == pytest.approx(145 / 150)


def test_before_two_checkpoints_of_one_attempt_nothing_is_known() -> None:
    story = Story()
    assert measured_goodput(story.events) is None
    story.start()
    story.train(10, every=10)
    story.start("restart", down=20.0)
    story.train(10, every=10)

    assert measured_goodput(story.events) is None


def test_a_simulation_of_a_run_like_it_agrees() -> None:
    """Failures come as the simulation draws them, but for those that hit a restart: after exponential times."""
    draws, story = random.Random(0), Story()
    story.start()
    while story.saved < 50_000:
        story.train(round(draws.expovariate(1 / 280) / STEP), every=10)
        story.start("restart", down=20.0)

    found = measured_goodput(story.events)

    assert found is not None
    scenario = found.scenario(nodes=1, min_nodes=1, mtbf_seconds=300.0, replace_seconds=0.0)
    assert (scenario.restart_seconds, scenario.stall_seconds) == (pytest.approx(20.0), pytest.approx(STALL))
    predicted = mean_outcome(scenario, "fixed", trials=20, seed=0)
    assert found.ratio == pytest.approx(predicted.goodput, rel=0.03)
    assert found.lost_steps == pytest.approx(predicted.lost_steps, rel=0.15)
    assert found.restarts == pytest.approx(predicted.restarts, rel=0.1)
