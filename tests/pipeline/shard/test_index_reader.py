from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DatasetError
from pipeline.load.dataset import Dataset
from pipeline.shard.index import IndexRow, ShardIndex
from pipeline.shard.index_pages import PAGE_ROWS
from pipeline.shard.index_reader import IndexReader
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage

SHARDS, SAMPLES = 6, 20 * PAGE_ROWS + 5


@dataclass(frozen=True)
class CountingStorage(Storage):
    """A store that records every ranged read."""

    reads: list[tuple[str, int, int]] = field(default_factory=list, hash=False, compare=False)

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        self.reads.append((url, offset, length))
        return super().read_range(url, offset, length, etag)


def row(shard: int, place: int) -> IndexRow:
    return IndexRow(f"{'long/' * shard}{place:05d}", 512 + 100 * place, 90, place, 20, 30, shard, "jpeg")


@pytest.fixture
def table(tmp_path: Path) -> ShardTable:
    entries = []
    for shard in range(SHARDS):
        rows = [row(shard, place) for place in range(SAMPLES)]
        index = ShardIndex.from_rows(f"part/{shard}", 10**6, "", (), rows)
        entry = ShardEntry.of(index)
        Storage().write(entry.index_url(str(tmp_path)), index.to_bytes())
        entries.append(entry)
    return ShardTable.of(entries)


def reader(storage: Storage, tmp_path: Path, table: ShardTable, cache_bytes: int) -> IndexReader:
    return IndexReader(storage, str(tmp_path), table, cache_bytes)


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 1 << 20, 1 << 30])
def test_rows_are_those_of_the_index_whatever_the_cache(tmp_path: Path, table: ShardTable, cache_bytes: int) -> None:
    rows = reader(Storage(), tmp_path, table, cache_bytes)
    generator = np.random.default_rng(0)

    for _ in range(30):
        shard = int(generator.integers(SHARDS))
        places = generator.integers(0, SAMPLES, generator.integers(1, 40))
        assert rows.rows(shard, places) == [row(shard, place) for place in places.tolist()]


def test_a_block_of_a_large_data_set_costs_one_small_read(tmp_path: Path, table: ShardTable) -> None:
    storage = CountingStorage()
    rows = reader(storage, tmp_path, table, 100_000)

    rows.rows(4, np.arange(500, 532))
    rows.rows(4, np.arange(505, 540))

    assert len(storage.reads) == 1
    assert storage.reads[0][2] < 2 * PAGE_ROWS * 80 + 8


def test_indexes_that_fit_are_read_once_each(tmp_path: Path, table: ShardTable) -> None:
    storage = CountingStorage()
    rows = reader(storage, tmp_path, table, 1 << 30)

    for place in range(0, SAMPLES, 50):
        for shard in range(SHARDS):
            rows.rows(shard, np.array([place]))

    assert len(storage.reads) == SHARDS


def test_threads_that_miss_together_read_once(tmp_path: Path, table: ShardTable) -> None:
    storage = CountingStorage()
    rows = reader(storage, tmp_path, table, 1 << 30)
    together = threading.Barrier(8)

    def read(place: int) -> list[IndexRow]:
        together.wait()
        return rows.rows(2, np.array([place]))

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(read, range(8)))

    assert found == [[row(2, place)] for place in range(8)]
    assert len(storage.reads) == 1


def test_far_rows_of_one_shard_are_read_apart_and_near_ones_together(tmp_path: Path, table: ShardTable) -> None:
    storage = CountingStorage()
    rows = reader(storage, tmp_path, table, 100_000)

    rows.rows(0, np.array([0, 3 * PAGE_ROWS, 19 * PAGE_ROWS]))

    assert len(storage.reads) == 2


def test_an_index_of_other_content_is_refused_page_by_page(tmp_path: Path, table: ShardTable) -> None:
    other = ShardIndex.from_rows("part/1", 10**6, "", (), [row(2, place) for place in range(SAMPLES)])
    Path(table[1].index_url(str(tmp_path))).write_bytes(other.to_bytes())

    with pytest.raises(DatasetError, match=r"part/1\.index.*page 2"):
        reader(Storage(), tmp_path, table, 100_000).rows(1, np.array([2 * PAGE_ROWS]))


def test_a_missing_index_is_named(tmp_path: Path, table: ShardTable) -> None:
    Path(table[3].index_url(str(tmp_path))).unlink()

    with pytest.raises(DatasetError, match=r"part/3\.index.*missing"):
        reader(Storage(), tmp_path, table, 0).rows(3, np.array([0]))


def test_a_dataset_gives_rows_in_the_order_of_the_ids(tmp_path: Path, table: ShardTable) -> None:
    dataset = Dataset(Storage(), str(tmp_path), Manifest(2, "", (), 0, table))
    ids = np.random.default_rng(1).integers(0, SHARDS * SAMPLES, 200)

    rows = dataset.rows(ids)

    assert [(sample.id, sample.shard, sample.place) for sample in rows] == [
        (sample, sample // SAMPLES, sample % SAMPLES) for sample in ids.tolist()
    ]
    assert all(sample.row == row(sample.shard, sample.place) for sample in rows)
    assert dataset.rows([]) == []
