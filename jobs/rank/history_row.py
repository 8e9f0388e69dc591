"""One row of the history (docs/data-format.md), as rank 0 writes it: of a step that was done, or skipped."""

from __future__ import annotations

from typing import Any

from jobs.recipe.schedule import Schedule
from jobs.step.step_reading import slowest
from jobs.step.training_step import SharedStep
from pipeline.order.sample_order import ConsumedDigest, Order


def done_row(
    step: int, epoch: int, learning_rate: float, shared: SharedStep, *, world_size: int, attempt: int
) -> dict[str, Any]:
    """The row of a step that is done, without a digest; one without an update says why.

    Args:
        step: From 1.
        epoch: Of its batch.
        learning_rate: Of its update.
        shared: What all ranks know of it, as rank 0 has it.
        world_size: Ranks that did it.
        attempt: In which.
    """
    assert shared.figures
    reading, ranks = shared.figures
    return {
        "step": step,
        "epoch": epoch,
        "loss": None if shared.fault else shared.loss,
        "learning_rate": learning_rate,
        "world_size": world_size,
        "attempt": attempt,
        "samples": shared.samples,
        "substitutions": int(reading.substitutions),
        # Of the slowest rank: since the last step, or since the attempt could read.
        "step_seconds": round(slowest(ranks, "step_seconds"), 6),
        "data_wait_seconds": round(slowest(ranks, "data_wait_seconds"), 6),
        **({"skipped": shared.fault} if shared.fault else {}),
    }


def skipped_row(step: int, order: Order, schedule: Schedule, *, world_size: int, attempt: int) -> dict[str, Any]:
    """The row of a step that an earlier attempt rolled back.

    Args:
        step: From 0, as the order counts them.
        order: Of the samples.
        schedule: Of the run.
        world_size: Ranks that skip it.
        attempt: In which.
    """
    return {
        "step": step + 1,
        "epoch": order.epoch(step),
        "loss": None,
        "learning_rate": schedule.learning_rate(step),
        "world_size": world_size,
        "attempt": attempt,
        "samples": str(ConsumedDigest.of(order.batch(step))),
        "substitutions": 0,
        "step_seconds": 0.0,
        "data_wait_seconds": 0.0,
        "skipped": "left out by a rollback",
    }
