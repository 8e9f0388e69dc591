from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from jobs.metrics.exporter import RunExporter
from jobs.metrics.run_figures import RunFigures
from jobs.metrics.utilization import GroupCompute

TOTAL_STEPS = 10
COMPUTE = GroupCompute(step_flops=1e9, peak_flops_per_second=None, devices="")


@pytest.fixture
def figures() -> RunFigures:
    return driven({})


def driven(before: Mapping[str, Any]) -> RunFigures:
    fixed: dict[str, Any] = {"state": "starting", "waiting": False, "total_steps": TOTAL_STEPS}
    return RunFigures(fixed, before, RunExporter("first", "127.0.0.1", 0), global_batch_size=4)


def train(figures: RunFigures, step: int, now: float | None = None, **measured: object) -> None:
    row = {"step": step, "epoch": 0, "world_size": 2, "loss": 1.0, "data_wait_seconds": 0.0, **measured}
    figures.step_done(row, gradient_norm=1.0, reading={}, ranks=(), now=time.monotonic() if now is None else now)


def test_a_run_is_about_to_end_after_its_last_step(figures: RunFigures) -> None:
    """What distinguishes an endpoint that ends as planned from one that is lost."""
    figures.group_began(attempt=1, world_size=2, resume_step=0, compute=COMPUTE)
    train(figures, TOTAL_STEPS - 1)
    assert figures["ending"] == 0
    train(figures, TOTAL_STEPS)
    assert figures["ending"] == 1

    figures.group_failed()
    figures.group_began(attempt=2, world_size=2, resume_step=5, compute=COMPUTE)
    assert figures["ending"] == 0


def test_larger_images_begin_new_rates_and_are_foreseen_by_the_eta(figures: RunFigures) -> None:
    compute = replace(COMPUTE, step_flops=3e9, step_flops_from=((1, 1e9), (4, 3e9)))
    figures.group_began(attempt=1, world_size=2, resume_step=0, compute=compute)

    for step, now in ((1, 0.0), (2, 2.0), (3, 4.0)):
        train(figures, step, now)
    assert figures["eta_seconds"] == pytest.approx(7 * 3 * 2.0), "seven steps with three times the operations"
    assert figures["device_flops_per_second"] == pytest.approx(1e9 / 2.0 / 2)
    train(figures, 4, 12.0)
    assert figures["images_per_second"] == pytest.approx(2.0), "no mean of two sizes"
    train(figures, 5, 20.0)
    assert figures["images_per_second"] == pytest.approx(4 / 8.0)
    assert figures["device_flops_per_second"] == pytest.approx(3e9 / 8.0 / 2)
    assert figures["eta_seconds"] == pytest.approx(5 * 8.0)


def test_a_run_that_was_asked_to_stop_is_about_to_end_whatever_happens(figures: RunFigures) -> None:
    figures.group_began(attempt=1, world_size=2, resume_step=0, compute=COMPUTE)
    figures.stop_asked()
    assert (figures["state"], figures["ending"]) == ("stopping", 1)

    figures.group_failed()
    figures.group_began(attempt=2, world_size=2, resume_step=0, compute=COMPUTE)
    train(figures, 1)
    assert figures["ending"] == 1


def test_the_best_validation_is_kept_over_drivers_and_begins_anew_with_other_samples(figures: RunFigures) -> None:
    def validate(figures: RunFigures, step: int, correct: int, plan: str = "a plan") -> tuple[float, float, float]:
        about = {"validation_samples": 200, "validation_plan": plan}
        train(figures, step, validation_top1=correct / 200, **about)
        train(figures, step + 1)
        ends = (figures["validation_low"], figures["validation_high"], figures["validation_best_low"])
        return tuple(pytest.approx(end, abs=1e-4) for end in ends)  # type: ignore[return-value]

    # Wilson's intervals of 120 and of 80 of 200, which are mirror images.
    better, worse = (0.5308, 0.6654), (0.3346, 0.4692)

    assert (*better, better[0]) == validate(figures, 1, 120)
    assert (*worse, better[0]) == validate(figures, 3, 80)
    later = driven(figures.heartbeat())
    assert (later["validation_top1"], later["validation_best_low"]) == (0.4, pytest.approx(better[0], abs=1e-4))
    assert (*worse, better[0]) == validate(later, 5, 80)
    assert (*worse, worse[0]) == validate(later, 7, 80, "other samples")
