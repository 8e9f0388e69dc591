from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DatasetError
from pipeline.ingest.writer import index_url, tar_url
from pipeline.load.dataset import Dataset
from pipeline.shard.index_reader import IndexReader
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class CountingStorage(Storage):
    """A store that records every ranged read."""

    reads: list[tuple[str, int, int]] = field(default_factory=list, hash=False, compare=False)

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        self.reads.append((url, offset, length))
        return super().read_range(url, offset, length, etag)


def test_samples_come_back_in_the_order_of_their_ids(dataset: Dataset) -> None:
    ids = [60, 0, 13, 12, 13, 41]

    samples = dataset.read(ids)

    assert [sample.id for sample in samples] == ids
    assert [sample.key for sample in samples] == [f"{sample:08d}" for sample in ids]
    assert [sample.shard for sample in samples] == [f"shard-{sample // 13:06d}" for sample in ids]


def test_every_sample_holds_the_photograph_and_its_class(dataset: Dataset, photographs: Path) -> None:
    originals = {path.read_bytes(): path.parent.name for path in photographs.rglob("*.jpg")}

    samples = dataset.read(np.arange(dataset.samples))

    assert {sample.data for sample in samples} == set(originals)
    assert all(dataset.manifest.classes[sample.label] == originals[sample.data] for sample in samples)


def test_neighbours_share_a_request(dataset: Dataset) -> None:
    storage = CountingStorage()
    counted = Dataset(storage, dataset.url, dataset.manifest)

    counted.read([3, 4, 5, 9, 11, 12, 13, 14])

    tars = [url for url, _, _ in storage.reads if url.endswith(".tar")]
    assert len(tars) == 4  # 3-5, 9, 11-12 in one shard; 13-14 in the next


def test_only_the_indexes_that_are_needed_are_read(own_dataset: Dataset) -> None:
    for shard in (1, 2, 3):
        Path(index_url(own_dataset.url, f"shard-{shard:06d}")).unlink()

    assert len(own_dataset.read([0, 60])) == 2


def test_the_index_cache_stays_within_its_bytes(dataset: Dataset) -> None:
    one = dataset.index(0).table.nbytes
    small = IndexReader(dataset.storage, dataset.url, dataset.manifest.shards, cache_bytes=2 * one)

    for _ in range(2):
        for shard, entry in enumerate(dataset.manifest.shards):
            small.rows(shard, np.arange(entry.samples))

    assert 0 < small.cached_bytes <= 2 * one


def test_a_flipped_byte_is_found_and_named(own_dataset: Dataset) -> None:
    index = own_dataset.index(2)
    path = Path(tar_url(own_dataset.url, "shard-000002"))
    data = bytearray(path.read_bytes())
    data[int(index.table["offset"][4]) + 100] ^= 1
    path.write_bytes(data)

    with pytest.raises(DatasetError) as caught:
        own_dataset.read(np.arange(own_dataset.samples))
    assert all(
        part in str(caught.value) for part in ("shard-000002.tar", "00000030", str(index.table["offset"][4]), "CRC32C")
    )
    assert len(own_dataset.read([29, 31])) == 2


def test_a_truncated_shard_is_found(own_dataset: Dataset) -> None:
    path = Path(tar_url(own_dataset.url, "shard-000001"))
    path.write_bytes(path.read_bytes()[: int(own_dataset.index(1).table["offset"][9]) + 10])

    with pytest.raises(DatasetError, match="end early"):
        own_dataset.read([22])


def test_a_missing_shard_is_found(own_dataset: Dataset) -> None:
    Path(tar_url(own_dataset.url, "shard-000001")).unlink()

    with pytest.raises(DatasetError, match="missing"):
        own_dataset.read([13])


@pytest.mark.parametrize("content", [None, b"other"])
def test_a_missing_or_changed_index_is_found(own_dataset: Dataset, content: bytes | None) -> None:
    path = Path(index_url(own_dataset.url, "shard-000000"))
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DatasetError, match="index"):
        own_dataset.read([0])


def test_opening_what_is_no_dataset_says_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="convmae shard"):
        Dataset.open(Storage(), str(tmp_path))
