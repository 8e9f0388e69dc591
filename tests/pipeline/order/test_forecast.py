from __future__ import annotations

import io
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c

from pipeline.load.dataset import Dataset
from pipeline.load.read_ahead import ReadAhead
from pipeline.order.forecast import Forecast, dealt_effect, intra_block_correlation
from pipeline.order.sample_order import Order
from pipeline.shard.index import IndexRow, ShardIndex
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage

IMAGENET = 1_281_167


@dataclass(frozen=True)
class CountingStorage(Storage):
    """A store that records every ranged read of a tar."""

    reads: list[int] = field(default_factory=list, hash=False, compare=False)

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        if url.endswith(".tar"):
            self.reads.append(length)
        return super().read_range(url, offset, length, etag)


def cut(samples: int, per_shard: int) -> np.ndarray:
    return np.diff(np.append(np.arange(0, samples, per_shard), samples))


def measured_effect(order: Order, groups: np.ndarray, epochs: int, most_steps: int = 10**9) -> float:
    """Chi-square per degree of freedom of batches over groups; `groups` has each sample's."""
    expected = order.global_batch_size * np.bincount(groups) / order.samples
    steps = order.steps_per_epoch * epochs
    found = []
    for step in np.unique(np.linspace(0, steps - 1, min(steps, most_steps)).astype(int)).tolist():
        counts = np.bincount(groups[order.batch(step)], minlength=len(expected))
        found.append(((counts - expected) ** 2 / expected).sum() / (len(expected) - 1))
    return float(np.mean(found))


@pytest.mark.parametrize(("lanes", "block", "window", "quoted"), [(64, 32, 64, 2.0), (64, 16, 256, 1.2)])
def test_the_figures_for_imagenet_are_those_of_the_design(lanes: int, block: int, window: int, quoted: float) -> None:
    order = Order(IMAGENET, 4096, lanes, 0, block, window)

    effect = Forecast.of(order, cut(IMAGENET, 1000)).design_effect

    assert effect == pytest.approx(quoted, rel=0.1)
    b, s, k = order.lane_batch_size, block, window
    assert effect == pytest.approx(1 + (b - 1) * (s - 1) / (k * s - 1), rel=0.06)
    shards = np.repeat(np.arange(1282), 1000)[:IMAGENET]
    assert measured_effect(order, shards, 1, most_steps=30) == pytest.approx(effect, rel=0.1)


@pytest.mark.parametrize("per_shard", [13, 1000])
@pytest.mark.parametrize(("block", "window"), [(1, 16), (8, 2), (8, 8), (32, 2), (32, 8)])
@pytest.mark.parametrize(("batch", "lanes"), [(24, 3), (96, 3), (96, 12), (30, 1), (40, 40)])
def test_the_predicted_design_effect_is_measured(
    batch: int, lanes: int, block: int, window: int, per_shard: int
) -> None:
    order = Order(16_003, batch, lanes, 1, block, window)
    shards = np.arange(16_003) // per_shard

    predicted = Forecast.of(order, np.bincount(shards)).design_effect

    assert measured_effect(order, shards, epochs=1, most_steps=100) == pytest.approx(predicted, rel=0.2)


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_is_counted_as_it_is_dealt(epoch: int) -> None:
    sizes = np.array([0, 500, 13, 700, 788])
    order = Order(2001, 36, 6, 5, 8, 3)
    shards = np.repeat(np.arange(5), sizes)
    expected = 36 * sizes[1:] / 2001

    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    counts = [np.bincount(shards[order.batch(step)], minlength=5)[1:] for step in steps]

    measured = np.mean([((count - expected) ** 2 / expected).sum() / 3 for count in counts])
    assert dealt_effect(order, sizes, epoch) == pytest.approx(measured)


def test_the_forecast_is_the_mean_over_seeds() -> None:
    sizes = cut(3000, 300)
    orders = [Order(3000, 64, 8, seed, 16, 4) for seed in range(60)]

    mean = np.mean([dealt_effect(order, sizes, 0) for order in orders])

    assert mean == pytest.approx(Forecast.of(orders[0], sizes).design_effect, rel=0.04)


def test_shards_of_unlike_sizes_and_empty_ones_are_foreseen() -> None:
    sizes = np.array([5, 0, 1200, 300, 40, 1000, 0, 700, 333])
    order = Order(int(sizes.sum()), 60, 6, 3, 16, 4)

    predicted = Forecast.of(order, sizes).design_effect

    measured = measured_effect(order, np.searchsorted(np.cumsum(sizes[sizes > 0]), np.arange(sizes.sum()), "right"), 6)
    assert measured == pytest.approx(predicted, rel=0.2)


@pytest.mark.parametrize(("block", "window"), [(8, 4), (32, 8)])
@pytest.mark.parametrize("layout", ["sorted", "shuffled", "halves"])
def test_the_design_effect_of_labels_is_foreseen_from_some_blocks(layout: str, block: int, window: int) -> None:
    order = Order(20_000, 96, 6, 1, block, window)
    labels = np.arange(20_000) // 400
    if layout == "shuffled":
        labels = np.random.default_rng(0).permutation(labels)
    elif layout == "halves":  # neighbours of one class by halves, like class folders dealt out in turn
        labels = (np.arange(20_000) // 800) * 2 + np.random.default_rng(0).integers(0, 2, 20_000)
    chosen = np.random.default_rng(1).choice(order.blocks, 100, replace=False)
    blocks = [labels[order.block_start(block) : order.block_start(block + 1)] for block in chosen]

    forecast = Forecast.of(order, cut(20_000, 1000))
    predicted = forecast.label_effect(order, intra_block_correlation(blocks))

    assert measured_effect(order, labels, 2) == pytest.approx(predicted, rel=0.2)
    if layout == "sorted":
        assert predicted == pytest.approx(forecast.design_effect, rel=0.1)
    if layout == "shuffled":
        assert predicted == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("blocks", "correlation"),
    [
        ([[1, 1, 1], [2, 2, 2]], 1.0),
        ([[1, 1], [1, 1]], 0.0),
        ([[1], [2]], 0.0),
        ([[1, 2], [1, 2]], -1.0),
    ],
)
def test_correlation_of_labels_in_blocks(blocks: list[list[int]], correlation: float) -> None:
    assert intra_block_correlation([np.array(block) for block in blocks]) == pytest.approx(correlation)


def test_a_forecast_over_two_thousand_million_samples_is_that_of_a_smaller_one_of_the_same_kind() -> None:
    large = Forecast.of(Order(2 * 10**9, 4096, 64, 0), np.full(200_000, 10_000))
    small = Forecast.of(Order(2 * 10**7, 4096, 64, 0), np.full(2000, 10_000))

    assert large.design_effect == pytest.approx(small.design_effect, rel=0.01)
    assert large.reads == pytest.approx(100 * small.reads, rel=0.01)


@pytest.mark.parametrize(("block", "window"), [(1, 1), (1, 3), (32, 1), (1000, 1000)])
def test_a_forecast_needs_little_memory_whatever_the_windows(block: int, window: int) -> None:
    tracemalloc.start()
    forecast = Forecast.of(Order(2 * 10**9, 4096, 64, 0, block, window), np.full(200_000, 10_000))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert forecast.design_effect >= 0.99
    assert peak_bytes < 64 << 20


def synthetic_dataset(storage: Storage, folder: Path, sizes: list[int]) -> Dataset:
    """Tars of random bytes, which the reader takes for images."""
    generator = np.random.default_rng(0)
    entries = []
    for shard, size in enumerate(sizes):
        index = _write_tar(folder / f"{shard}.tar", [generator.bytes(7000 + 10 * (n % 600)) for n in range(size)])
        (folder / f"{shard}.index").write_bytes(index.to_bytes())
        entries.append(ShardEntry.of(index))
    return Dataset(storage, str(folder), Manifest(2, "", (), 0, ShardTable.of(entries)))


def _write_tar(path: Path, images: list[bytes]) -> ShardIndex:
    rows = []
    with tarfile.open(path, "w") as tar:
        for n, image in enumerate(images):
            member = tarfile.TarInfo(f"{n:06d}.jpg")
            member.size = len(image)
            rows.append(IndexRow(f"{n:06d}", tar.offset + 512, len(image), crc32c(image), 1, 1, -1))
            tar.addfile(member, io.BytesIO(image))
    return ShardIndex.from_rows(path.stem, path.stat().st_size, "", (), rows)


@pytest.mark.parametrize(
    ("batch", "lanes", "block", "window"), [(32, 4, 32, 4), (32, 4, 8, 8), (60, 12, 16, 2), (60, 3, 27, 100)]
)
def test_an_epoch_issues_the_requests_and_bytes_that_were_foreseen(
    tmp_path: Path, batch: int, lanes: int, block: int, window: int
) -> None:
    storage = CountingStorage()
    dataset = synthetic_dataset(storage, tmp_path, [700, 311, 89, 512, 388])
    order = Order(dataset.samples, batch, lanes, 2, block, window)

    def read(epochs: int) -> tuple[int, int]:
        storage.reads.clear()
        for rank in range(2):
            lanes_of_rank, steps = order.rank_lanes(rank, 2), range(epochs * order.steps_per_epoch)
            with ThreadPoolExecutor(2) as executor:
                ahead = ReadAhead(dataset, order, lanes_of_rank, steps, executor, whole_windows=True)
                for step in steps:
                    for pending in ahead.request(step):
                        pending.result()
        return len(storage.reads), sum(storage.reads)

    # What opening costs, where the first batch is read sample by sample, is in both.
    (more_reads, more_bytes), (reads, read_bytes) = read(4), read(1)

    forecast = Forecast.of(order, dataset.manifest.shards.samples)
    assert (more_reads - reads) / 3 == pytest.approx(forecast.reads, rel=0.05)
    image_bytes = order.steps_per_epoch * batch * dataset.mean_sample_bytes
    assert (more_bytes - read_bytes) / 3 == pytest.approx(image_bytes, rel=0.1)
