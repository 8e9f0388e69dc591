from __future__ import annotations

import time
from typing import Any

import pytest

from jobs.metrics.exporter import RunExporter
from jobs.metrics.run_figures import RunFigures

TOTAL_STEPS = 10


@pytest.fixture
def figures() -> RunFigures:
    fixed: dict[str, Any] = {"state": "starting", "waiting": False, "total_steps": TOTAL_STEPS}
    return RunFigures(fixed, {}, RunExporter("first", "127.0.0.1", 0), global_batch_size=4)


def train(figures: RunFigures, step: int) -> None:
    row = {"step": step, "world_size": 2, "loss": 1.0, "data_wait_seconds": 0.0}
    figures.step_done(row, gradient_norm=1.0, reading={}, ranks=(), now=time.monotonic())


def test_a_run_is_about_to_end_after_its_last_step(figures: RunFigures) -> None:
    """What distinguishes an endpoint that ends as planned from one that is lost."""
    figures.group_began(attempt=1, world_size=2, resume_step=0)
    train(figures, TOTAL_STEPS - 1)
    assert figures["ending"] == 0
    train(figures, TOTAL_STEPS)
    assert figures["ending"] == 1

    figures.group_failed()
    figures.group_began(attempt=2, world_size=2, resume_step=5)
    assert figures["ending"] == 0


def test_a_run_that_was_asked_to_stop_is_about_to_end_whatever_happens(figures: RunFigures) -> None:
    figures.group_began(attempt=1, world_size=2, resume_step=0)
    figures.stop_asked()
    assert (figures["state"], figures["ending"]) == ("stopping", 1)

    figures.group_failed()
    figures.group_began(attempt=2, world_size=2, resume_step=0)
    train(figures, 1)
    assert figures["ending"] == 1
