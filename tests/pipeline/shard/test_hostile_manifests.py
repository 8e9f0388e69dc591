"""Manifests and indexes made to do harm, with sums that fit: refused by name, or one fault each."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from pipeline.errors import DamagedManifestError, DatasetError, OrderError
from pipeline.load.bad_sample import BadSample
from pipeline.load.dataset import Dataset
from pipeline.load.shard_reader import Sample
from pipeline.order.sample_order import Order
from pipeline.shard.index import IndexRow, ShardIndex, Skipped
from pipeline.shard.index_pages import HEAD
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import MOST_NAME_BYTES, ShardEntry, ShardTable
from pipeline.shard.verify import verify_shard
from pipeline.store.storage import Storage

Change = Callable[[dict[str, Any]], object]


def sealed(fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return body[:-1] + b',"crc32c":"%08x"}' % google_crc32c.value(body)


def manifest(folder: Path, shards: int = 1) -> dict[str, Any]:
    columns = {
        "name": [f"shard-{number:06d}" for number in range(shards)],
        "samples": [8] * shards,
        "tar_bytes": [10240] * shards,
        "index_sha256": ["0" * 64] * shards,
        "key_bytes": [8] * shards,
        "extension_bytes": [3] * shards,
    }
    return {"format_version": 2, "sources_digest": "x", "classes": [], "skipped": 0, "shards": columns}


def loaded(folder: Path, fields: dict[str, Any]) -> Manifest:
    (folder / "manifest.json").write_bytes(sealed(fields))
    return Manifest.load(Storage(), str(folder))


# Manifests


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", "abc"),
        ("classes", {"a": 1}),
        ("classes", [1, {}]),
        ("classes", None),
        ("skipped", -5),
        ("skipped", "lots"),
        ("skipped", True),
        ("skipped", 1.0),
        ("sources_digest", 5),
        ("sources_digest", None),
        ("format_version", 2.0),
        ("format_version", True),
        ("format_version", "2"),
        ("shards.samples", [8, True]),
        ("shards.samples", [8, 1.0]),
        ("shards.samples", {"a": 8, "b": 8}),
        ("shards.tar_bytes", [None, 1]),
        ("shards.key_bytes", [False, 8]),
        ("shards.name", ["a", 5]),
        ("shards.name", ["a", "b\0"]),
        ("shards.etag", [0, "x"]),
        ("shards.tar", ["", 5]),
        ("shards.tar", ["", "a\0b"]),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_name(tmp_path: Path, field: str, value: object) -> None:
    fields = manifest(tmp_path, shards=2)
    loaded(tmp_path, fields)

    outer, _, inner = field.partition(".")
    if inner:
        fields[outer][inner] = value
    else:
        fields[outer] = value

    with pytest.raises(DatasetError, match=field):
        loaded(tmp_path, fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pixels", None),
        ("pixels", [1]),
        ("pixels", {"images": 8, "mean": [0.5], "std": [0.2], "more": 1}),
        ("images", 0),
        ("images", 8.0),
        ("images", True),
        ("mean", "0.5"),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, True]),
        ("mean", [0.5, 0.5, 1.01]),
        ("mean", []),
        ("std", [0.2, 0.2, 0]),
        ("std", [0.2, 0.2, -0.1]),
        ("std", [0.2, 0.2, 10**400]),
        ("std", None),
    ],
)
def test_pixels_that_cannot_be_are_refused(tmp_path: Path, field: str, value: object) -> None:
    fields = manifest(tmp_path) | {"format_version": 3}
    fields["pixels"] = {"images": 8, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    assert loaded(tmp_path, fields).channels == 3

    if field == "pixels":
        fields["pixels"] = value
    else:
        fields["pixels"][field] = value

    with pytest.raises(DamagedManifestError, match="pixels"):
        loaded(tmp_path, fields)


def test_a_manifest_of_one_version_with_the_fields_of_the_other_is_refused(tmp_path: Path) -> None:
    pixels = {"images": 8, "mean": [0.5], "std": [0.2]}
    for version, more in ((3, {}), (2, {"pixels": pixels})):
        with pytest.raises(DamagedManifestError, match="pixels"):
            loaded(tmp_path, manifest(tmp_path) | {"format_version": version} | more)


@pytest.mark.parametrize("field", ["name", "etag", "tar"])
def test_one_long_name_does_not_make_all_shards_as_long(tmp_path: Path, field: str) -> None:
    """50,001 shards, a megabyte: 49 GB, if the column were as wide."""
    fields = manifest(tmp_path, shards=5001)
    fields["shards"][field] = [f"s{number}" for number in range(5001)]
    fields["shards"][field][7] = "x" * (1 << 20)

    tracemalloc.start()
    with pytest.raises(DamagedManifestError, match=rf"shards\.{field} of shard 7, 'xxx.* 1048576 bytes") as refused:
        loaded(tmp_path, fields)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 64 << 20
    assert len(str(refused.value)) < 600


def test_a_name_of_the_most_bytes_is_taken(tmp_path: Path) -> None:
    fields = manifest(tmp_path)
    fields["shards"]["name"] = ["ä" * (MOST_NAME_BYTES // 2)]

    assert loaded(tmp_path, fields).shards[0].name == "ä" * (MOST_NAME_BYTES // 2)


@pytest.mark.parametrize(
    "place", ["zip:///etc/passwd", "dir://x", "reference://x", "simplecache::file:///x", "gopher://x"]
)
def test_a_tar_must_lie_in_a_store(tmp_path: Path, place: str) -> None:
    fields = manifest(tmp_path)
    fields["shards"]["tar"] = [place]

    with pytest.raises(DatasetError, match="tars must have a known protocol"):
        loaded(tmp_path, fields)


@pytest.mark.parametrize("place", ["../../x.tar", "a/../../x.tar", "./x.tar", ".."])
def test_a_tar_without_a_whole_address_lies_below_its_data_set(tmp_path: Path, place: str) -> None:
    fields = manifest(tmp_path)
    fields["shards"]["tar"] = [place]

    with pytest.raises(DatasetError, match=r"must name tars below the dataset.*index the tars again"):
        loaded(tmp_path, fields)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../x", "http://host/x", "s3://other/x"])
def test_a_shard_lies_below_its_data_set(tmp_path: Path, name: str) -> None:
    fields = manifest(tmp_path)
    fields["shards"]["name"] = [name]

    with pytest.raises(DatasetError, match="leads out of the dataset"):
        loaded(tmp_path, fields)


@pytest.mark.parametrize("place", ["s3://bucket/a.tar", "https://host/a.tar", "/data/a.tar", "elsewhere/a.tar"])
def test_a_tar_may_lie_in_another_store_than_its_index(tmp_path: Path, place: str) -> None:
    fields = manifest(tmp_path)
    fields["shards"]["tar"] = [place]

    assert loaded(tmp_path, fields).shards[0].tar == place


@pytest.mark.parametrize("samples", [14, 30, 10**4, 2**33, 2**50])
def test_more_samples_than_the_index_has_are_refused_by_its_name(own_dataset: Dataset, samples: int) -> None:
    folder = Path(own_dataset.url)
    fields = json.loads((folder / "manifest.json").read_bytes())
    del fields["crc32c"]
    fields["shards"] = {name: column[:1] for name, column in fields["shards"].items()} | {"samples": [samples]}
    loaded(folder, fields)
    dataset = Dataset.open(Storage(), str(folder))

    for use in (dataset.rows, dataset.read):
        with pytest.raises(DatasetError, match=r"shard-000000\.index.*index the dataset again"):
            use([samples - 1])


def test_numbers_of_samples_that_would_overflow_are_refused() -> None:
    """Blocks are found by multiplying the two."""
    order = Order(2**33, 4, 2, 0, block_samples=32)
    assert order.batch(order.steps_per_epoch - 1).min() >= 0

    with pytest.raises(OrderError, match="must stay below"):
        Order(2**35, 4, 2, 0, block_samples=2)


# Indexes


def with_rows(folder: Path, change: dict[str, int]) -> tuple[Dataset, ShardEntry]:
    """The dataset's first shard, of whose third row the index says something else, in a manifest that fits."""
    storage, url = Storage(), str(folder)
    index = Dataset.open(storage, url).index(0)
    rows = [index.row(place) for place in range(len(index))]
    rows[2] = rows[2]._replace(**change)  # type: ignore[arg-type]
    changed = ShardIndex.from_rows(index.shard, index.tar_bytes, index.sources_digest, index.skipped, rows)
    entry = ShardEntry.of(changed)
    storage.write(entry.index_url(url), changed.to_bytes())
    Manifest(2, "x", (), 0, ShardTable.of([entry])).save(storage, url, [])
    return Dataset.open(storage, url), entry


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offset": -100}, "is not in the tar"),
        ({"offset": 100}, "is not in the tar"),
        ({"offset": 2**62}, "is not in the tar"),
        ({"length": 2**62}, "is not in the tar"),
        ({"length": 0}, "is not in the tar"),
        ({"length": -5}, "is not in the tar"),
        ({"offset": 2**63 - 1, "length": 2**63 - 1}, "is not in the tar"),
        ({"height": -1, "width": -1}, "its size is -1 x -1 pixels"),
        ({"label": -2}, "its label is -2"),
        ({"label": -(2**62)}, "its label is"),
    ],
)
def test_a_row_that_cannot_be_is_one_bad_sample_and_one_fault(
    own_dataset: Dataset, change: dict[str, int], says: str
) -> None:
    dataset, entry = with_rows(Path(own_dataset.url), change)

    found = dataset.read_each([0, 1, 2, 3])
    bad = found.pop(2)
    assert isinstance(bad, BadSample)
    assert bad.fault == "index"
    assert says in bad.reason
    assert all(isinstance(sample, Sample) for sample in found)
    with pytest.raises(DatasetError, match="shard index"):
        dataset.read([2])
    faults = verify_shard(Storage(), dataset.url, entry, deep=False).faults
    assert [fault.what for fault in faults if says in fault.what] == [faults[0].what]


def test_an_image_of_more_bytes_than_any_may_have_is_not_read() -> None:
    row = IndexRow("a", 512, 1 << 30, 0, 8, 8, -1)

    assert "more than" in row.flaw(1 << 40)
    assert not row._replace(length=1 << 28).flaw(1 << 40)


def test_two_rows_of_one_place_are_a_fault(own_dataset: Dataset) -> None:
    index = own_dataset.index(0)
    first = index.row(0)
    dataset, entry = with_rows(
        Path(own_dataset.url), {"offset": first.offset, "length": first.length, "crc": first.crc}
    )

    faults = verify_shard(Storage(), dataset.url, entry, deep=False).faults

    assert f"its place is that of {first.member}" in faults[0].what


def footer(**changes: Any) -> bytes:
    fields = {
        "shard": "x",
        "tar_bytes": 1024,
        "sources_digest": "",
        "skipped": [],
        "samples": 0,
        "key_bytes": 1,
        "extension_bytes": 1,
        "tar_etag": None,
        "digest": "00" * 32,
    }
    return json.dumps(fields | changes, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b"[]",
        b"null",
        b"5",
        footer(samples=2**62),
        footer(samples=-5),
        footer(samples=10**400),
        footer(samples=1e300),
        footer(samples=True),
        footer(key_bytes=2**40, samples=1),
        footer(key_bytes=2**31 - 8, extension_bytes=2**31 - 8, samples=1),
        footer(key_bytes=10**400),
        footer(skipped=5),
        footer(skipped=[5]),
        footer(skipped=[{"path": 5, "reason": []}]),
        footer(tar_bytes="1"),
        footer(digest=5),
        footer(tar_etag=5),
    ],
    ids=lambda data: data[:40].decode(),
)
def test_a_footer_that_cannot_be_is_damage(data: bytes, own_dataset: Dataset) -> None:
    index = HEAD + data + struct.pack("<II", len(data), google_crc32c.value(data))

    with pytest.raises(DatasetError, match="must be whole"):
        ShardIndex.from_bytes(index, "x.index")
    entry = own_dataset.manifest.shards[0]
    Storage().write(entry.index_url(own_dataset.url), index)
    faults = verify_shard(Storage(), own_dataset.url, entry, deep=False).faults
    assert "its index is damaged" in faults[0].what


def test_what_was_skipped_must_be_text() -> None:
    """All sums fit: it is what the one who made it wrote."""
    odd = ShardIndex.from_rows("x", 1024, "", (Skipped(5, "odd"),), [])  # type: ignore[arg-type]

    with pytest.raises(DatasetError, match="must be whole"):
        ShardIndex.from_bytes(odd.to_bytes(), "x.index")
    good = replace(odd, skipped=(Skipped("a", "odd"),))
    assert len(ShardIndex.from_bytes(good.to_bytes(), "x.index")) == 0


def test_honest_rows_have_no_flaw(own_dataset: Dataset) -> None:
    rows = own_dataset.rows(np.arange(61))

    assert all(not sample.row.flaw(own_dataset.manifest.shards[sample.shard].tar_bytes) for sample in rows)
