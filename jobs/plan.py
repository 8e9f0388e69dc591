"""What `convmae inspect` says: a recipe or a data set in numbers, before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jobs.recipe import Recipe
from jobs.schedule import Schedule
from jobs.trainer import order_of
from model.cost import flops_per_image, parameters
from pipeline.manifest import Manifest
from pipeline.storage import Storage


@dataclass(frozen=True)
class DatasetSize:
    """What a plan needs to know of a data set."""

    samples: int
    bytes: int
    origin: str
    """Where the figures are from, for people."""

    @classmethod
    def of(cls, storage: Storage, recipe: Recipe) -> DatasetSize:
        """The recipe's data set; the training set of ImageNet-1k where it names none."""
        if not recipe.data:
            return IMAGENET
        storage.check(recipe.data, write=False)
        manifest = Manifest.load(storage, recipe.data)
        return cls(manifest.samples, manifest.tar_bytes, recipe.data)


IMAGENET = DatasetSize(1_281_167, 147_897_477_120, "not set: ImageNet-1k's training set is assumed")
"""Images, and bytes of ILSVRC2012_img_train.tar."""


def recipe_lines(recipe: Recipe, size: DatasetSize) -> Iterator[tuple[str, str]]:
    """Field and value: the resolved recipe, then what follows from it."""
    fields = recipe.to_json()
    model = fields.pop("model")
    for field, value in fields.items():
        yield field, _text(value)
    for field, value in model.items():
        yield f"model.{field}", _text(value)
    yield from _plan_lines(recipe, size)


def _plan_lines(recipe: Recipe, size: DatasetSize) -> Iterator[tuple[str, str]]:
    counts, cost = parameters(recipe.model), flops_per_image(recipe.model)
    order = order_of(recipe, size.samples)
    schedule = Schedule.of(recipe, order.steps_per_epoch)
    mean_bytes = size.bytes / size.samples
    images_per_epoch = order.steps_per_epoch * recipe.global_batch_size
    yield "", ""
    yield "data set", size.origin
    yield "samples", f"{size.samples:,} ({size.bytes / 1e9:.2f} GB)"
    yield "parameters", f"{counts.trainable / 1e6:.2f} M (encoder {counts.encoder / 1e6:.2f} M)"
    yield "FLOPs per image", f"{cost.forward.total / 1e9:.2f} G forward, {cost.training / 1e9:.2f} G with backward"
    yield "steps per epoch", f"{schedule.steps_per_epoch:,}"
    yield "images per epoch", f"{images_per_epoch:,} ({size.samples - images_per_epoch:,} rest, other ones each epoch)"
    yield "total steps", f"{schedule.total_steps:,}"
    yield "warm-up steps", f"{schedule.warmup_steps:,.0f}"
    yield "peak learning rate", f"{recipe.learning_rate:g}"
    yield "bytes per epoch", f"{images_per_epoch * mean_bytes / 1e9:.2f} GB"
    yield "training FLOPs", f"{cost.training * schedule.total_steps * recipe.global_batch_size / 1e18:.3f} EFLOP"
    yield "order", f"{recipe.lanes} lanes of {order.lane_batch_size} images, blocks of {order.used_block_samples}"
    window_bytes = recipe.lanes * order.window_samples * mean_bytes
    yield "open window", f"{order.window_samples * recipe.lanes:,} samples, {window_bytes / 1e6:,.0f} MB over all ranks"


def dataset_lines(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Field and value of a data set."""
    yield "digest", manifest.digest
    yield "samples", f"{manifest.samples:,}"
    yield "bytes", f"{manifest.tar_bytes:,}"
    yield "shards", f"{len(manifest.shards):,}"
    yield "classes", f"{len(manifest.classes):,}"
    yield "skipped sources", f"{manifest.skipped:,}"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "-"
