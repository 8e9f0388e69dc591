"""What an ablation will cost, before it begins: hours of GPUs by data sheets, or of cores by one measured speed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.ablate.spec import Spec, Trial
from jobs.finetune.training_size import trained_size
from jobs.recipe.cost import steps_by_size
from jobs.recipe.finetune import Finetune
from jobs.recipe.plan import IMAGENET
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import Schedule, order_of
from jobs.recipe.sizing import H100_FLOPS_PER_SECOND, NodeType, timed_steps
from jobs.terminal import duration_text
from pipeline.store.storage import Storage

CORE_FLOPS_PER_SECOND = 19e9
"""Reached by one core of a server: `tiny` at 64x64 pixels trains 200 images/s on it, decoding included."""
NODE = NodeType(gpus=8, flops_per_second=H100_FLOPS_PER_SECOND)


@dataclass(frozen=True)
class Estimate:
    """Of one run."""

    images: int
    """That it trains with."""
    steps: int
    seconds: float
    """On its `max_workers`."""
    hours: float
    """Of GPUs or cores, all workers together."""
    unit: str

    @classmethod
    def of(cls, recipe: Recipe, samples: int) -> Estimate:
        """Of a run on a dataset of so many samples.

        Raises:
            UserError: The dataset is too small for a batch.
        """
        schedule = Schedule.of(recipe, order_of(recipe, samples).steps_per_epoch)
        steps, workers = schedule.total_steps, recipe.max_workers
        length = {"steps_per_epoch": schedule.steps_per_epoch, "total_steps": steps}
        if recipe.device == "cuda":
            node = NodeType(min(NODE.gpus, workers), NODE.flops_per_second)
            timed = timed_steps(recipe, node, math.ceil(workers / NODE.gpus), **length)
            seconds = sum(each.steps * each.step_seconds for each in timed)
            return cls(samples, steps, seconds, workers * seconds / 3600, "GPU-hours")
        cores = workers * max(1.0, recipe.cpus_per_worker)
        flops = sum(len(each.steps) * each.cost.training_flops for each in steps_by_size(recipe, **length))
        seconds = recipe.global_batch_size * flops / (CORE_FLOPS_PER_SECOND * cores)
        return cls(samples, steps, seconds, cores * seconds / 3600, "core-hours")


def estimates(storage: Storage, spec: Spec) -> dict[Trial, Estimate]:
    """Of each run; where no data is named, on as many images as the spec is meant for."""
    assumed = spec.file.images or IMAGENET.samples
    sizes: dict[tuple[str, Finetune | None], int] = {}
    for recipe in (trial.recipe for trial in spec.trials):
        if (recipe.data, recipe.finetune) not in sizes:
            share = recipe.finetune.trained_ratio if recipe.finetune else 1.0
            samples = trained_size(storage, recipe).samples if recipe.data else round(assumed * share)
            sizes[recipe.data, recipe.finetune] = samples
    return {trial: Estimate.of(trial.recipe, sizes[trial.recipe.data, trial.recipe.finetune]) for trial in spec.trials}


PLAN_COLUMNS = ("variant", "differs by", "runs", "workers", "steps", "one run alone", "hours")


def plan_rows(found: dict[Trial, Estimate]) -> Iterator[tuple[str, ...]]:
    """A row for each variant."""
    for variant in dict.fromkeys(trial.variant.name for trial in found):
        runs = [(trial, one) for trial, one in found.items() if trial.variant.name == variant]
        trial, one = runs[0]
        changes = ", ".join(f"{field}={value}" for field, value in trial.variant.changes.items())
        yield (
            variant,
            changes or trial.variant.base,
            f"{len(runs)}",
            f"{trial.recipe.max_workers} {trial.recipe.device}",
            f"{one.steps:,}",
            duration_text(one.seconds),
            f"{sum(each.hours for _, each in runs):,.1f}",
        )


def total_text(found: dict[Trial, Estimate]) -> str:
    """All runs in one line."""
    units = dict.fromkeys(one.unit for one in found.values())
    sums = (f"{sum(one.hours for one in found.values() if one.unit == unit):,.1f} {unit}" for unit in units)
    basis = "estimated by data sheets of H100 GPUs" if "GPU-hours" in units else "estimated from one measured speed"
    images = " or ".join(f"{count:,}" for count in sorted({one.images for one in found.values()}))
    return f"{len(found)} runs on {images} images, {' and '.join(sums)} of training ({basis})"
