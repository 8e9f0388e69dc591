from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline_tars import tar_bytes

from pipeline.access.places import Listed
from pipeline.errors import StorageError
from pipeline.load.dataset import Dataset
from pipeline.shard.index import ShardIndex
from pipeline.shard.verify import Fault, verify_shard
from pipeline.store.storage import Storage

MakeJpeg = Callable[..., bytes]


def faults(dataset: Dataset, shard: int = 1, *, deep: bool = False, storage: Storage | None = None) -> list[Fault]:
    verdict = verify_shard(storage or Storage(), dataset.url, dataset.manifest.shards[shard], deep=deep)
    assert verdict.samples == dataset.manifest.shards[shard].samples
    return list(verdict.faults)


@pytest.fixture
def tar(own_dataset: Dataset) -> Path:
    return Path(own_dataset.manifest.shards[1].tar_url(own_dataset.url))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_shard_has_no_fault(dataset: Dataset, deep: bool) -> None:
    assert [faults(dataset, shard, deep=deep) for shard in range(len(dataset.manifest.shards))] == [[]] * 5


def test_every_flipped_byte_of_an_image_is_named(own_dataset: Dataset, tar: Path) -> None:
    rows = [own_dataset.index(1).row(place) for place in (0, 3, 12)]
    for row in rows:
        flip(tar, row.offset + row.length // 2)

    found = faults(own_dataset)

    assert [(fault.key, fault.offset) for fault in found] == [(row.key, row.offset) for row in rows]
    assert all("CRC32C" in fault.what for fault in found)
    assert found[0].line == f"shard-000001, key {rows[0].key}, offset {rows[0].offset}: {found[0].what}"


def test_every_byte_of_a_shard_is_looked_at(own_dataset: Dataset, tar: Path) -> None:
    """But those that say nothing of a sample: padding, and the rest of the last record."""
    whole = tar.read_bytes()
    members = own_dataset.index(1)
    first, last = members.row(0), members.row(12)
    for offset in [*range(0, 512, 37), *range(first.offset, first.offset + 50, 7), last.offset + last.length - 1]:
        flip(tar, offset)
        assert faults(own_dataset), offset
        tar.write_bytes(whole)
    assert faults(own_dataset) == []


def test_a_damaged_header_is_named_though_readers_find_the_image(own_dataset: Dataset, tar: Path) -> None:
    row = own_dataset.index(1).row(4)
    flip(tar, row.offset - 512 + 3)

    found = faults(own_dataset)

    assert [(fault.key, fault.offset) for fault in found] == [(None, row.offset - 512), (row.key, row.offset)]
    assert "damaged header" in found[0].what
    assert "though its bytes are" in found[1].what


def test_a_changed_label_is_named(own_dataset: Dataset, tar: Path) -> None:
    label = tar.read_bytes().index(b".cls")
    header = label // 512 * 512
    flip(tar, header + 512)

    found = faults(own_dataset)

    assert len(found) == 1 and "has the label" in found[0].what


def test_a_truncated_shard_names_every_lost_sample(own_dataset: Dataset, tar: Path) -> None:
    rows = [own_dataset.index(1).row(place) for place in range(13)]
    tar.write_bytes(tar.read_bytes()[: rows[10].offset + 5])

    found = faults(own_dataset)

    assert "bytes instead of" in found[0].what
    assert [fault.key for fault in found if fault.key] == [row.key for row in rows[10:]]


def test_a_missing_tar_and_a_missing_index_are_named(own_dataset: Dataset, tar: Path) -> None:
    Path(own_dataset.manifest.shards[2].index_url(own_dataset.url)).unlink()
    tar.unlink()

    assert ["missing" in fault.what for fault in faults(own_dataset)] == [True]
    assert ["its index is missing" in fault.what for fault in faults(own_dataset, 2)] == [True]


def test_a_damaged_index_and_that_of_another_shard_are_named(own_dataset: Dataset) -> None:
    shards = own_dataset.manifest.shards
    flip(Path(shards[0].index_url(own_dataset.url)), 200)
    shutil.copy(shards[3].index_url(own_dataset.url), shards[2].index_url(own_dataset.url))

    assert "its index is damaged" in faults(own_dataset, 0)[0].what
    assert "its index is not the manifest's" in faults(own_dataset, 2)[0].what
    assert {fault.shard for fault in faults(own_dataset, 2)} == {"shard-000002"}


def test_a_tar_of_the_same_size_with_other_images_is_named(own_dataset: Dataset, tar: Path) -> None:
    """An exchange of two shards' tars, as a careless copy does."""
    other = Path(own_dataset.manifest.shards[0].tar_url(own_dataset.url))
    tar.write_bytes(other.read_bytes())

    found = faults(own_dataset)

    assert {fault.key for fault in found if fault.key} == {own_dataset.index(1).row(n).key for n in range(13)}


def test_a_replaced_object_is_named(own_dataset: Dataset) -> None:
    class Tagged(Storage):
        def etag(self, url: str) -> str | None:  # noqa: ARG002
            return '"new"'

    entry = replace(own_dataset.manifest.shards[1], etag='"old"')

    verdict = verify_shard(Tagged(), own_dataset.url, entry, deep=False)

    assert [fault.what for fault in verdict.faults] == ['was replaced: its ETag is "new" instead of "old"']


def test_deep_finds_what_never_decoded(tmp_path: Path, jpeg: MakeJpeg) -> None:
    from pipeline.ingest.index_tar import IndexTask, index_tar
    from pipeline.ingest.source import Tar

    (tmp_path / "a.tar").write_bytes(tar_bytes([("x.jpg", jpeg(1)), ("y.jpg", jpeg(2)[:-200])]))
    tar = Tar(Listed("a.tar"), (tmp_path / "a.tar").stat().st_size)
    report = index_tar(Storage(), str(tmp_path), IndexTask(str(tmp_path), tar, deep=False, salvage=False)).report
    assert report is not None

    assert verify_shard(Storage(), str(tmp_path), report.entry, deep=False).faults == ()
    found = verify_shard(Storage(), str(tmp_path), report.entry, deep=True).faults
    assert [(fault.key, "does not decode: Premature end" in fault.what) for fault in found] == [("y", True)]


def test_deep_finds_a_size_that_is_not_the_indexs(own_dataset: Dataset) -> None:
    place = Path(own_dataset.manifest.shards[1].index_url(own_dataset.url))
    index = ShardIndex.from_bytes(place.read_bytes(), "")
    table = index.table.copy()
    table["width"][5] += 1
    altered = replace(index, table=table)
    place.write_bytes(altered.to_bytes())
    entry = replace(own_dataset.manifest.shards[1], index_sha256=altered.digest)

    found = verify_shard(Storage(), own_dataset.url, entry, deep=True).faults

    assert [fault.key for fault in found] == [index.row(5).key]


def test_a_store_that_fails_is_no_fault_of_the_shard(dataset: Dataset) -> None:
    class Down(Storage):
        def read_range(self, url: str, offset: int, length: int) -> bytes:  # noqa: ARG002
            raise StorageError("storage", "must be reachable", url, "wait")

    with pytest.raises(StorageError):
        faults(dataset, storage=Down())


def test_a_manifest_that_counts_otherwise_is_a_fault(own_dataset: Dataset) -> None:
    entry = replace(own_dataset.manifest.shards[1], samples=14)

    found = verify_shard(Storage(), own_dataset.url, entry, deep=False).faults

    assert [fault.what for fault in found] == ["its index has 13 samples, the manifest 14"]
