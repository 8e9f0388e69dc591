from __future__ import annotations

import functools
import operator

import pytest

from pipeline.image.decode import decode
from pipeline.load.dataset import Dataset
from pipeline.load.pixel_sums import PixelTask, shard_sums
from pipeline.shard.pixel_statistics import PixelSums
from pipeline.store.storage import Storage


def test_a_task_sums_the_chosen_images_of_its_shard(dataset: Dataset) -> None:
    entry = dataset.manifest.shards[2]
    samples = dataset.read([26 + place for place in (0, 3, 12)])

    found = shard_sums(Storage(), dataset.url, PixelTask(entry, (0, 3, 12)))

    assert found == functools.reduce(operator.add, (PixelSums.of(decode(sample.data)) for sample in samples))


def test_more_images_than_are_read_at_once_are_all_summed(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    task = PixelTask(dataset.manifest.shards[0], tuple(range(13)))
    at_once = shard_sums(Storage(), dataset.url, task)
    monkeypatch.setattr("pipeline.load.pixel_sums._AT_ONCE", 3)

    assert shard_sums(Storage(), dataset.url, task) == at_once
    assert at_once.images == 13


def test_a_damaged_image_is_left_out(own_dataset: Dataset) -> None:
    entry = own_dataset.manifest.shards[0]
    row = own_dataset.rows([5])[0].row
    path = f"{own_dataset.url}/{entry.name}.tar"
    data = bytearray(Storage().read(path))
    data[row.offset + 100] ^= 0xFF
    Storage().write(path, bytes(data))

    found = shard_sums(Storage(), own_dataset.url, PixelTask(entry, (4, 5, 6)))

    assert found == shard_sums(Storage(), own_dataset.url, PixelTask(entry, (4, 6)))
    assert found.images == 2
