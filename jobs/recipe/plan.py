"""The plan of a recipe, as `convmae inspect` shows it: its fields, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.recipe.cost import RecipeCost, SizedSteps, steps_by_size
from jobs.recipe.reading_plan import ReadingPlan
from jobs.recipe.recipe import PARTS, Recipe
from jobs.recipe.schedule import Schedule, order_of
from model.cost import Parameters
from pipeline.order.forecast import Int64s
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class DatasetSize:
    """What a plan needs to know about a data set."""

    samples: int
    bytes: int
    origin: str
    """The source of the figures, for people."""
    shard_samples: Int64s = field(compare=False)
    """(shards,): samples of each shard."""
    classes: int = 0
    """Of a fine-tuning's labels; 0: not known, or not needed."""

    @classmethod
    def of(cls, storage: Storage, recipe: Recipe) -> DatasetSize:
        """The recipe's data set; the training set of ImageNet-1k if it names none."""
        if not recipe.data:
            return IMAGENET
        storage.check(recipe.data, write=False)
        manifest = Manifest.load(storage, recipe.data)
        return cls(manifest.samples, manifest.tar_bytes, recipe.data, manifest.shards.samples)

    def only(self, shard_samples: Int64s, classes: int) -> DatasetSize:
        """Some of the samples, of labels with so many classes.

        Args:
            shard_samples: (shards,): how many of each shard.
            classes: Of all of them.
        """
        samples = int(shard_samples.sum())
        note = "" if samples == self.samples else f"; {samples:,} of {self.samples:,} samples are trained with"
        size_bytes = round(self.bytes * samples / max(1, self.samples))
        return DatasetSize(samples, size_bytes, self.origin + note, shard_samples[shard_samples > 0], classes)


IMAGENET = DatasetSize(
    1_281_167,
    147_897_477_120,
    "not set: ImageNet-1k's training set is assumed, in shards of 1,000",
    np.append(np.full(1281, 1000), 167),
)
"""Images, and bytes of ILSVRC2012_img_train.tar."""


def recipe_json(recipe: Recipe, size: DatasetSize) -> dict[str, Any]:
    """The resolved recipe and the order that follows from it, as plain values."""
    order = order_of(recipe, size.samples)
    plan = ReadingPlan.of(order, size.shard_samples, size.bytes, recipe.max_workers)
    schedule, cost = Schedule.of(recipe, order.steps_per_epoch), RecipeCost.of(recipe, size.classes)
    parts = _sizes(recipe, schedule, size)
    return {
        "recipe": recipe.to_json(),
        "samples": size.samples,
        "bytes": size.bytes,
        **({"classes": size.classes} if recipe.finetune else {}),
        "parameters": cost.parameters.trainable,
        "training_flops_per_image": round(cost.training_flops),
        **({"resolutions": list(map(_size_json, parts))} if recipe.resolution_schedule else {}),
        "total_steps": schedule.total_steps,
        "plan": plan.to_json(),
    }


def recipe_lines(recipe: Recipe, size: DatasetSize) -> Iterator[tuple[str, str]]:
    """Field and value: the resolved recipe, then what follows from it."""
    fields = recipe.to_json()
    parts = {name: fields.pop(name) for name in PARTS}
    for name, value in fields.items():
        yield name, _text(value)
    for part, values in parts.items():
        for name, value in (values or {}).items():
            yield f"{part}.{name}", _text(value)
    yield from _plan_lines(recipe, size)


def _sizes(recipe: Recipe, schedule: Schedule, size: DatasetSize) -> list[SizedSteps]:
    return steps_by_size(recipe, schedule.steps_per_epoch, schedule.total_steps, size.classes)


def _size_json(part: SizedSteps) -> dict[str, Any]:
    return {
        "image_size": list(part.resolution.model.image_shape),
        "first_epoch": part.resolution.first_epoch,
        "steps": len(part.steps),
        "training_flops_per_image": round(part.cost.training_flops),
    }


def _plan_lines(recipe: Recipe, size: DatasetSize) -> Iterator[tuple[str, str]]:
    cost = RecipeCost.of(recipe, size.classes)
    order = order_of(recipe, size.samples)
    schedule = Schedule.of(recipe, order.steps_per_epoch)
    plan = ReadingPlan.of(order, size.shard_samples, size.bytes, recipe.max_workers)
    images_per_epoch, parts = plan.samples_per_epoch, _sizes(recipe, schedule, size)
    yield "", ""
    yield "data set", size.origin
    yield "samples", f"{size.samples:,} ({size.bytes / 1e9:.2f} GB)"
    if recipe.finetune:
        yield "classes", f"{size.classes:,}"
    yield "parameters", _parameters(cost.parameters)
    yield "FLOPs per image", _image_flops(cost)
    if recipe.resolution_schedule:
        for each in parts:
            begin = f"from epoch {each.resolution.first_epoch:,}, {len(each.steps):,} steps"
            yield f"  {each.resolution.text}", f"{begin}: {_image_flops(each.cost)}"
    if recipe.model.views > 1 and not recipe.finetune:
        views, images = recipe.model.views, recipe.images_at_once
        yield (
            "masks per image",
            f"{views}, each patch visible in one; {views * images:,} in a micro-batch of {images:,}",
        )
    yield "steps per epoch", f"{schedule.steps_per_epoch:,}"
    yield "images per epoch", f"{images_per_epoch:,} ({size.samples - images_per_epoch:,} rest, other ones each epoch)"
    yield "total steps", f"{schedule.total_steps:,}"
    yield "warm-up steps", f"{schedule.warmup_steps:,.0f}"
    yield "peak learning rate", f"{recipe.learning_rate:g}"
    flops = sum(each.cost.training_flops * len(each.steps) for each in parts) * recipe.global_batch_size
    plain = cost.training_flops * schedule.total_steps * recipe.global_batch_size
    share = f", {flops / plain:.1%} of those with one size" if recipe.resolution_schedule else ""
    yield "training FLOPs", f"{flops / 1e18:.3f} EFLOP{share}"
    yield "same at any world size", _equality(recipe)
    yield from plan.lines()


def _image_flops(cost: RecipeCost) -> str:
    forward, whole = (f"{each / 1e9:.2f} G" for each in (cost.forward_flops, cost.training_flops))
    return f"{forward} forward, {whole} with backward"


def _equality(recipe: Recipe) -> str:
    """What of a run is equal at another world size, and what that rests on."""
    if not recipe.is_exact:
        return "samples, crops and masks; losses within rounding"
    grains = recipe.global_batch_size // recipe.grain
    rests_on = "the same kind of CPU or GPU, versions, threads of PyTorch and `compile`"
    return f"every bit, by {grains:,} grains of {recipe.grain:,} images; it rests on {rests_on}"


def _parameters(counts: Parameters) -> str:
    """What is trained; of a pretraining or fine-tuning the encoder's part, of a linear head what is frozen."""
    rest = f"encoder {counts.encoder / 1e6:.2f} M" if counts.encoder else f"frozen {counts.frozen / 1e6:.2f} M"
    return f"{counts.trainable / 1e6:.2f} M ({rest})"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "-"
