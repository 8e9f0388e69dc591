from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DatasetError, OrderError
from pipeline.image.augment import augmented, crop_draws, random_crop
from pipeline.image.decode import decode
from pipeline.ingest.writer import tar_url
from pipeline.load.batch import Batch
from pipeline.load.dataset import Dataset
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class CountingStorage(Storage):
    """A store that records every ranged read."""

    reads: list[tuple[str, int, int]] = field(default_factory=list, hash=False, compare=False)

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        if url.endswith(".tar"):
            self.reads.append((url, offset, length))
        return super().read_range(url, offset, length, etag)


ORDER = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)


def batches(dataset: Dataset, start: int, stop: int, **changes: Any) -> list[Batch]:
    options = {"image_shape": (16, 16), "rank": 0, "world_size": 1, "seed": 5, "threads": 2} | changes
    return list(Loader(dataset, options.pop("order", ORDER), **options).batches(start, stop))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        (a.step, a.epoch) == (b.step, b.epoch)
        and torch.equal(a.sample_ids, b.sample_ids)
        and torch.equal(a.images, b.images)
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def straight(dataset: Dataset) -> list[Batch]:
    """Three epochs and a bit on one rank."""
    return batches(dataset, 0, 17)


def test_batches_follow_the_order_and_the_recipe(dataset: Dataset, straight: list[Batch]) -> None:
    for step, batch in enumerate(straight):
        assert (batch.step, batch.epoch) == (step, step // ORDER.steps_per_epoch)
        assert np.array_equal(batch.sample_ids.numpy(), ORDER.batch(step))
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (12, 3, 16, 16)
        for sample, image in zip(dataset.read(batch.sample_ids.numpy()), batch.images.numpy(), strict=True):
            pixels = decode(sample.data)
            (draws,) = crop_draws(5, batch.epoch, np.array([sample.id]))
            crop = random_crop(draws, *pixels.shape[:2])
            assert np.array_equal(image, augmented(pixels, crop, (16, 16)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_world_size_sees_the_same_images(dataset: Dataset, straight: list[Batch], world_size: int) -> None:
    ranks = [batches(dataset, 0, 17, rank=rank, world_size=world_size) for rank in range(world_size)]

    for step, whole in enumerate(straight):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), whole.images)
        assert torch.equal(torch.cat([rank[step].sample_ids for rank in ranks]), whole.sample_ids)


@pytest.mark.parametrize(
    "changes", [{"threads": 1}, {"threads": 5}, {"prefetch_batches": 0}, {"prefetch_batches": 9}, {"open_bytes": 0}]
)
def test_threads_prefetch_and_memory_change_nothing(
    dataset: Dataset, straight: list[Batch], changes: dict[str, int]
) -> None:
    assert same(batches(dataset, 0, 17, **changes), straight)


@pytest.mark.parametrize("start", range(17))
def test_a_run_resumed_at_any_step_continues_alike(dataset: Dataset, straight: list[Batch], start: int) -> None:
    assert same(batches(dataset, start, 17), straight[start:])


@pytest.mark.parametrize(("start", "stop"), [(0, 15), (2, 4), (3, 3), (4, 6), (7, 15)])
def test_nothing_is_read_that_is_not_used_and_nothing_twice_in_an_epoch(
    dataset: Dataset, start: int, stop: int
) -> None:
    storage = CountingStorage()
    counted = Dataset(storage, dataset.url, dataset.manifest)

    used = Counter(sample for batch in batches(counted, start, stop) for sample in batch.sample_ids.tolist())

    covered: Counter[int] = Counter()
    places = {}
    for shard, entry in enumerate(dataset.manifest.shards):
        index = dataset.index(shard)
        places |= {
            (entry.name, int(offset)): int(key)
            for key, offset in zip(index.table["key"], index.table["offset"], strict=True)
        }
    for url, offset, length in storage.reads:
        name = Path(url).stem
        covered.update(s for (shard, place), s in places.items() if shard == name and offset <= place < offset + length)
    assert covered == used


def test_nothing_is_read_beside_the_first_batch_until_it_is_decoded(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, reads_before = CountingStorage(), []

    def noting(data: bytes, channels: int, bits: int) -> Any:
        reads_before.append(len(storage.reads))
        return decode(data, channels, bits)

    monkeypatch.setattr("pipeline.load.image_maker.decode", noting)
    batches(Dataset(storage, dataset.url, dataset.manifest), 1, 4)

    first = ORDER.global_batch_size
    assert max(reads_before[:first]) <= first < max(reads_before)


def test_blocks_are_read_whole(dataset: Dataset) -> None:
    order = Order(61, global_batch_size=5, lanes=1, seed=5, block_samples=6, window_blocks=3)
    storage = CountingStorage()

    batches(Dataset(storage, dataset.url, dataset.manifest), 0, order.steps_per_epoch, order=order)

    blocks_and_shard_edges = order.blocks + len(dataset.manifest.shards)
    first_batch_and_split_blocks = 2 * order.global_batch_size
    assert len(storage.reads) <= blocks_and_shard_edges + first_batch_and_split_blocks


GROWING = {0: (16, 16), 1: (32, 32), 2: (32, 48), 3: (32, 32)}
"""Sizes of images by epoch: smaller ones in the first, of other proportions in the third."""


@pytest.fixture(scope="module")
def sized(dataset: Dataset) -> list[Batch]:
    """Three epochs and a bit of images whose size changes with the epoch."""
    return batches(dataset, 0, 17, image_shape=GROWING)


def test_images_have_the_size_of_their_epoch_and_are_those_of_a_loader_of_that_size(
    dataset: Dataset, sized: list[Batch]
) -> None:
    assert {batch.epoch: tuple(batch.images.shape[2:]) for batch in sized} == GROWING
    for batch in sized:
        (alone,) = batches(dataset, batch.step, batch.step + 1, image_shape=GROWING[batch.epoch])
        assert same([batch], [alone])
        assert np.array_equal(batch.crops, alone.crops)


def test_samples_and_crops_do_not_depend_on_the_size_of_images(straight: list[Batch], sized: list[Batch]) -> None:
    for plain, batch in zip(straight, sized, strict=True):
        assert torch.equal(plain.sample_ids, batch.sample_ids)
        assert np.array_equal(plain.crops, batch.crops)


@pytest.mark.parametrize(
    "changes", [{"threads": 5}, {"prefetch_batches": 0}, {"prefetch_batches": 9}, {"open_bytes": 0}]
)
def test_reading_ahead_into_an_epoch_of_another_size_changes_nothing(
    dataset: Dataset, sized: list[Batch], changes: dict[str, int]
) -> None:
    assert same(batches(dataset, 0, 17, image_shape=GROWING, **changes), sized)


@pytest.mark.parametrize("start", range(17))
def test_a_run_resumed_around_a_change_of_size_continues_alike(
    dataset: Dataset, sized: list[Batch], start: int
) -> None:
    assert same(batches(dataset, start, 17, image_shape=GROWING), sized[start:])


def test_every_world_size_sees_the_same_images_of_each_size(dataset: Dataset, sized: list[Batch]) -> None:
    ranks = [batches(dataset, 0, 17, rank=rank, world_size=3, image_shape=GROWING) for rank in range(3)]

    for step, whole in enumerate(sized):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), whole.images)


def threads_of_loaders() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("convmae-")}


def test_a_consumer_that_stops_early_leaves_no_thread(dataset: Dataset) -> None:
    before = threads_of_loaders()  # tests of hanging stores leave some behind
    generator = Loader(
        dataset, ORDER, image_shape=(16, 16), rank=0, world_size=1, seed=5, threads=3, prefetch_batches=4
    ).batches(0, 1000)
    next(generator)
    assert threads_of_loaders() - before

    generator.close()

    assert not threads_of_loaders() - before


def test_an_error_in_a_thread_reaches_the_consumer(own_dataset: Dataset) -> None:
    before = threads_of_loaders()
    path = Path(tar_url(own_dataset.url, "shard-000002"))
    data = bytearray(path.read_bytes())
    index = own_dataset.index(2)
    data[int(index.table["offset"][4]) + 100] ^= 1
    path.write_bytes(data)

    with pytest.raises(DatasetError, match="00000030"):
        batches(own_dataset, 0, 25)
    assert not threads_of_loaders() - before


def test_an_undecodable_sample_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes, channels: int, bits: int) -> None:
        raise ValueError("Premature end of JPEG file")

    monkeypatch.setattr("pipeline.load.image_maker.decode", refuse)
    with pytest.raises(DatasetError, match=r"shard-00000\d/000000\d\d\.jpg.*Premature end"):
        batches(dataset, 0, 1)


def test_an_order_over_other_samples_is_refused(dataset: Dataset) -> None:
    with pytest.raises(OrderError, match="must be the dataset's 61, got 60"):
        batches(dataset, 0, 1, order=replace(ORDER, samples=60))
