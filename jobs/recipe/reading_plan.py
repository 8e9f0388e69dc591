"""The plan of reading a data set: lanes, blocks, windows, how well they mix, requests, bytes, and keys by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jobs.terminal import bytes_text
from pipeline.errors import OrderError
from pipeline.load.dataset import Dataset
from pipeline.load.read_ahead import OPEN_BYTES
from pipeline.order import hashing
from pipeline.order.forecast import Forecast, Int64s, dealt_effect, intra_block_correlation
from pipeline.order.sample_order import Order
from pipeline.shard.index import NO_LABEL
from pipeline.shard.index_reader import INDEX_CACHE_BYTES
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

USUAL_ORDERS = ((4096, 256), (64, 8), (8, 8), (1, 1))
"""Batch and lanes of the ImageNet recipes and of the demonstration, then ones that small data sets suffice for."""
MOST_USUAL_LANES = 256
MOST_COUNTED = 200_000
MOST_CELLS = 1 << 24
"""Samples, and steps times shards, up to which the first epoch is counted exactly, in under a second."""
LABELLED_BLOCKS = 128
"""Blocks whose indexes are read to learn how labels lie in shards."""

_LABELS = 0x4C424C53


def usual_order(samples: int, numbers: Mapping[str, int]) -> Order:
    """The order that a data set is inspected with.

    Args:
        samples: In the data set.
        numbers: Those of batch, lanes, seed, block and window that were given.

    Raises:
        OrderError: The numbers do not fit each other or the data set.
    """
    usual = next((pair for pair in USUAL_ORDERS if pair[0] <= samples), USUAL_ORDERS[-1])
    batch = numbers.get("batch", usual[0])
    most = MOST_USUAL_LANES if "batch" in numbers else usual[1]
    lanes = max((divisor for divisor in range(1, min(batch, most) + 1) if batch % divisor == 0), default=1)
    return Order(
        samples,
        batch,
        numbers.get("lanes", lanes),
        numbers.get("seed", 0),
        block_samples=numbers.get("block", Order.block_samples),
        window_blocks=numbers.get("window", Order.window_blocks),
    )


@dataclass(frozen=True)
class ReadingPlan:
    """An order over shards of known sizes, and the number of ranks that share it."""

    order: Order
    forecast: Forecast
    world_size: int
    mean_sample_bytes: float
    dealt_effect: float | None = None
    """Design effect over shards of the first epoch, as dealt by the seed; None for large data sets, whose epochs
    all match the forecast."""
    label_effect: float | None = None
    """Design effect over labels; None if it was not asked for or there are no labels."""

    @classmethod
    def of(cls, order: Order, shard_samples: Int64s, tar_bytes: int, world_size: int) -> ReadingPlan:
        """Compute it from the sizes alone.

        Raises:
            OrderError: More ranks than lanes.
        """
        order.rank_lanes(0, world_size)
        countable = order.samples <= MOST_COUNTED and order.steps_per_epoch * len(shard_samples) <= MOST_CELLS
        dealt = dealt_effect(order, shard_samples, 0) if countable else None
        return cls(order, Forecast.of(order, shard_samples), world_size, tar_bytes / max(1, order.samples), dealt)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the data set that an epoch uses."""
        return self.order.steps_per_epoch * self.order.global_batch_size

    @property
    def open_samples(self) -> int:
        """Samples in the windows of all lanes."""
        return min(self.order.samples, self.order.lanes * self.order.window_samples)

    @property
    def open_bytes_per_rank(self) -> int:
        """Bytes that the rank with the most lanes holds in its windows."""
        lanes = -(-self.order.lanes // self.world_size)
        return int(min(self.order.samples, lanes * self.order.window_samples) * self.mean_sample_bytes)

    @property
    def whole_blocks(self) -> bool:
        """Whether a rank can hold its windows; otherwise it reads sample by sample."""
        return self.open_bytes_per_rank <= OPEN_BYTES

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        order = self.order
        return {
            "global_batch_size": order.global_batch_size,
            "lanes": order.lanes,
            "lane_batch_size": order.lane_batch_size,
            "world_size": self.world_size,
            "block_samples": order.used_block_samples,
            "blocks": order.blocks,
            "window_blocks": order.window_blocks,
            "window_samples": order.window_samples,
            "window_bytes": int(order.window_samples * self.mean_sample_bytes),
            "open_samples": self.open_samples,
            "open_bytes": int(self.open_samples * self.mean_sample_bytes),
            "open_bytes_per_rank": self.open_bytes_per_rank,
            "steps_per_epoch": order.steps_per_epoch,
            "samples_per_epoch": self.samples_per_epoch,
            "dropped_per_epoch": order.samples - self.samples_per_epoch,
            "design_effect": round(self.forecast.design_effect, 4),
            "first_epoch_design_effect": None if self.dealt_effect is None else round(self.dealt_effect, 4),
            "label_design_effect": None if self.label_effect is None else round(self.label_effect, 4),
            "gets_per_epoch": round(self.forecast.reads if self.whole_blocks else self.samples_per_epoch),
            "bytes_per_epoch": int(self.samples_per_epoch * self.mean_sample_bytes),
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Fields and values for people."""
        order, plan = self.order, self.to_json()
        block_bytes = order.used_block_samples * self.mean_sample_bytes
        yield "order", f"{order.lanes} lanes of {order.lane_batch_size} images a step"
        yield "blocks", f"{order.blocks:,} of {order.used_block_samples} images, {bytes_text(block_bytes)}"
        yield "window", f"{order.window_blocks} blocks a lane, {bytes_text(plan['window_bytes'])}"
        open_text = f"{plan['open_samples']:,} samples, {bytes_text(plan['open_bytes'])} over all ranks"
        yield "open window", f"{open_text}, {bytes_text(plan['open_bytes_per_rank'])} on one of {self.world_size}"
        yield "design effect", f"{self.forecast.design_effect:.2f} over shards; 1.00 is an independent draw"
        if self.dealt_effect is not None:
            yield "", f"{self.dealt_effect:.2f} in the first epoch, as dealt by seed {order.seed}"
        if self.label_effect is not None:
            yield "", f"{self.label_effect:.2f} over labels, from {min(LABELLED_BLOCKS, order.blocks)} blocks"
        how = "whole blocks" if self.whole_blocks else f"sample by sample: a rank may hold {bytes_text(OPEN_BYTES)}"
        yield "GETs per epoch", f"{plan['gets_per_epoch']:,} ({how})"
        yield "bytes per epoch", bytes_text(plan["bytes_per_epoch"])


def dataset_fields(manifest: Manifest) -> dict[str, Any]:
    """What a data set holds, as plain values."""
    return {
        "digest": manifest.digest,
        "samples": manifest.samples,
        "bytes": manifest.tar_bytes,
        "shards": len(manifest.shards),
        "classes": len(manifest.classes),
        "skipped_sources": manifest.skipped,
        "index_bytes": manifest.shards.index_bytes,
    }


def pixel_lines(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What the images are decoded to, and what their pixels are like."""
    pixels = manifest.pixels
    if pixels is None:
        yield "pixels", "never measured: runs take ImageNet's mean and deviation, unless their recipe has others"
        return
    yield "pixels", f"{pixels.channels} channels of {pixels.bits} bits, measured on {pixels.images:,} images"
    for name, values in (("mean", pixels.mean), ("deviation", pixels.std)):
        yield name, " ".join(f"{value:.4f}" for value in values)
    if manifest.restart_markers:
        yield "restart markers", "in its JPEGs"


def index_line(manifest: Manifest, order: Order) -> tuple[str, str]:
    """How the indexes are read."""
    held = manifest.shards.index_bytes
    if held <= INDEX_CACHE_BYTES:
        return "indexes", f"{bytes_text(held)}; a rank reads each that it needs once, whole, and keeps it"
    page = held / manifest.samples * order.used_block_samples
    return "indexes", f"{bytes_text(held)}; one more GET a block, of some {bytes_text(page)}"


def label_correlation(dataset: Dataset, order: Order) -> float | None:
    """Intra-block correlation of labels, from those of some blocks; None if samples have no labels.

    Raises:
        DatasetError: An index is missing or not the one that the manifest names.
    """
    places = np.arange(min(LABELLED_BLOCKS, order.blocks))
    chosen = hashing.permuted(hashing.key(_LABELS), order.blocks, places)
    bounds = zip(order.block_start(chosen).tolist(), order.block_start(chosen + 1).tolist(), strict=True)
    spans = [np.arange(start, stop) for start, stop in bounds]
    rows = iter(dataset.rows(np.concatenate(spans)))
    blocks = [np.array([next(rows).row.label for _ in span]) for span in spans]
    if all((block == NO_LABEL).all() for block in blocks):
        return None
    return intra_block_correlation(blocks)


@dataclass(frozen=True)
class InspectedDataset:
    """A data set, and the plan of reading it."""

    manifest: Manifest
    plan: ReadingPlan

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        pixels = self.manifest.pixels
        about = {"pixels": pixels and pixels.to_json(), "restart_markers": self.manifest.restart_markers}
        return {**dataset_fields(self.manifest), **about, "plan": self.plan.to_json()}

    def lines(self) -> Iterator[tuple[str, str]]:
        """Fields and values for people."""
        order = self.plan.order
        for field, value in dataset_fields(self.manifest).items():
            yield field.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
        yield from pixel_lines(self.manifest)
        yield "", ""
        yield "steps per epoch", f"{order.steps_per_epoch:,} of {order.global_batch_size:,} images"
        rest = f"{order.samples - self.plan.samples_per_epoch:,} rest, other ones each epoch"
        yield "images per epoch", f"{self.plan.samples_per_epoch:,} ({rest})"
        yield from self.plan.lines()
        yield index_line(self.manifest, order)


def inspected_dataset(storage: Storage, url: str, numbers: Mapping[str, int], *, labels: bool) -> InspectedDataset:
    """Plan the reading of the data set at `url`.

    Args:
        storage: Reaches it.
        url: Where its manifest lies.
        numbers: Those of batch, lanes, world, seed, block and window that were given.
        labels: Whether to read some labels, to see how they mix.

    Raises:
        DatasetError: There is no manifest, or a needed index is damaged.
        OrderError: The numbers do not fit each other or the data set.
    """
    dataset = Dataset.open(storage, url)
    order, manifest = usual_order(dataset.samples, numbers), dataset.manifest
    plan = ReadingPlan.of(order, manifest.shards.samples, manifest.tar_bytes, numbers.get("world", 1))
    correlation = label_correlation(dataset, order) if labels else None
    if correlation is not None:
        plan = replace(plan, label_effect=plan.forecast.label_effect(order, correlation))
    return InspectedDataset(manifest, plan)


def listed_steps(
    dataset: Dataset, order: Order, step: int, steps: int, *, world_size: int, rank: int | None = None
) -> Iterator[dict[str, Any]]:
    """What each rank, or one, reads in `steps` steps from `step`, as plain values; no image is read.

    Raises:
        OrderError: More ranks than lanes, no such rank, or no such step.
        DatasetError: An index is missing or not the one that the manifest names.
    """
    order.rank_lanes(0, world_size)
    if rank is not None and not 0 <= rank < world_size:
        raise OrderError("rank", f"must be from 0 to {world_size - 1}", rank, "ranks count from 0; see world")
    if step < 0:
        raise OrderError("step", "must be at least 0", step, "steps count from 0")
    if steps < 1:
        raise OrderError("steps", "must be at least 1", steps, "ask for one step or more")
    return _listed(dataset, order, range(step, step + steps), range(world_size) if rank is None else [rank], world_size)


def _listed(
    dataset: Dataset, order: Order, steps: range, ranks: Sequence[int], world_size: int
) -> Iterator[dict[str, Any]]:
    for step in steps:
        shares = [order.rank_batch(step, rank, world_size) for rank in ranks]
        rows = iter(dataset.rows(np.concatenate(shares)))
        for rank, share in zip(ranks, shares, strict=True):
            samples = [next(rows) for _ in share]
            yield {
                "step": step,
                "epoch": order.epoch(step),
                "rank": rank,
                "world_size": world_size,
                "keys": [sample.row.key for sample in samples],
                "shards": [dataset.manifest.shards[sample.shard].name for sample in samples],
                "samples": share.tolist(),
            }
