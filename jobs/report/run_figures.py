"""What runs are compared by: their curve, their cost and how far they came, from the run directory alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.recipe.recipe import Recipe
from jobs.report.curves import CHARTED, History
from jobs.run.directory import RunDirectory
from jobs.run.stored_steps import StoredSteps


@dataclass(frozen=True)
class Cost:
    """Hours of GPUs, or of cores where a run trains on CPUs."""

    unit: str
    """`GPU-hours` or `core-hours`."""
    productive: float
    """In steps that count: each once, of its last attempt."""
    whole: float | None
    """With steps that were redone, restarts, waits and saves; None where the run has not reported it."""

    @classmethod
    def of(cls, recipe: Recipe, steps: StoredSteps, heartbeat: Mapping[str, Any]) -> Cost:
        """The cost of a run.

        Args:
            recipe: Says what a worker has.
            steps: Its history, one row a step.
            heartbeat: Its newest.
        """
        is_gpu = recipe.device == "cuda"
        each = 1.0 if is_gpu else max(1.0, recipe.cpus_per_worker)
        productive = float(np.nansum(steps.numbers("world_size") * steps.numbers("step_seconds")))
        worker_seconds = heartbeat.get("worker_seconds_total")
        whole = None if worker_seconds is None else each * worker_seconds / 3600
        return cls("GPU-hours" if is_gpu else "core-hours", each * productive / 3600, whole)


@dataclass(frozen=True)
class RunFigures:
    """One run."""

    state: str
    step: int
    total_steps: int
    cost: Cost
    final_loss: float | None
    epochs: tuple[float, ...]
    """Of the curve's points."""
    losses: tuple[float, ...]
    """Means around them."""

    @classmethod
    def read(cls, run: RunDirectory, recipe: Recipe) -> RunFigures:
        """Read history and heartbeat."""
        return cls.of(recipe, run.read_heartbeat(), run.read_latest_steps(CHARTED))

    @classmethod
    def of(cls, recipe: Recipe, heartbeat: Mapping[str, Any], steps: StoredSteps) -> RunFigures:
        """Compute them; arguments as of `Cost.of`. The columns that are needed are CHARTED."""
        history = History.of(steps)
        steps_per_epoch = heartbeat.get("steps_per_epoch") or 0
        epochs: tuple[float, ...] = ()
        losses: tuple[float, ...] = ()
        if len(history):
            places, means = history.mean_losses
            epochs = tuple((places / steps_per_epoch if steps_per_epoch else places).tolist())
            losses = tuple(means.tolist())
        return cls(
            state=str(heartbeat.get("state", "not started")),
            step=int(heartbeat.get("step", 0)),
            total_steps=int(heartbeat.get("total_steps", 0)),
            cost=Cost.of(recipe, steps, heartbeat),
            final_loss=history.final_loss if len(history) else None,
            epochs=epochs,
            losses=losses,
        )
