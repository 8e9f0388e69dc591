from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.access.places import Given
from pipeline.errors import DatasetError
from pipeline.ingest.plan import Sharding, ShardTask, plan_shards
from pipeline.ingest.sources import Source, find_sources
from pipeline.load.dataset import Dataset
from pipeline.shard.index import Skipped
from pipeline.shard.manifest import MANIFEST_NAME, SKIPPED_NAME, Manifest, existing_manifest
from pipeline.shard.pixel_statistics import PixelStatistics
from pipeline.shard.table import ShardEntry, ShardReport, ShardTable
from pipeline.store.storage import Storage

TASKS = [ShardTask(f"shard-{n:06d}", "/photos", 10 * n, (Source(Given(f"{n}.jpg"), 5, None),)) for n in range(3)]
ENTRIES = [ShardEntry(task.name, 10, 2048, "ab" * 32) for task in TASKS]
REPORTS = [ShardReport(entry, (), kept=False) for entry in ENTRIES]


def test_a_saved_manifest_loads_as_it_was(tmp_path: Path) -> None:
    manifest = Manifest.of(TASKS, REPORTS, ("cat", "dog"))
    manifest.save(Storage(), str(tmp_path), [Skipped("x.jpg", "cut")])

    loaded = Manifest.load(Storage(), str(tmp_path))

    assert loaded == manifest
    assert loaded.digest == manifest.digest
    assert (loaded.samples, loaded.tar_bytes) == (30, 6144)
    assert json.loads((tmp_path / SKIPPED_NAME).read_text()) == {"path": "x.jpg", "reason": "cut"}


def test_what_was_measured_is_part_of_the_data_set(tmp_path: Path) -> None:
    plain = Manifest.of(TASKS, REPORTS, ())
    pixels = PixelStatistics(30, (0.5, 0.25, 0.125), (0.3, 0.2, 0.1))
    measured = plain.measured(pixels)
    measured.save(Storage(), str(tmp_path), [])

    loaded = Manifest.load(Storage(), str(tmp_path))

    assert loaded == measured and loaded.pixels == pixels
    assert (plain.format_version, plain.pixels, measured.format_version) == (2, None, 3)
    assert (plain.channels, measured.channels) == (3, 3)
    assert len({plain.digest, measured.digest, plain.measured(replace(pixels, images=29)).digest}) == 3


def test_that_images_have_restart_markers_is_part_of_the_data_set(tmp_path: Path) -> None:
    measured = Manifest.of(TASKS, REPORTS, ()).measured(PixelStatistics(30, (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)))
    marked = measured.marked()
    marked.save(Storage(), str(tmp_path), [])

    loaded = Manifest.load(Storage(), str(tmp_path))

    assert loaded == marked and loaded.restart_markers and not measured.restart_markers
    assert (measured.format_version, marked.format_version) == (3, 4)
    assert marked.digest != measured.digest


@pytest.mark.parametrize(("version", "fields"), [(4, {}), (4, {"restart_markers": 1}), (3, {"restart_markers": True})])
def test_markers_are_said_in_their_format_alone(tmp_path: Path, version: int, fields: dict[str, object]) -> None:
    measured = Manifest.of(TASKS, REPORTS, ()).measured(PixelStatistics(30, (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)))
    measured.save(Storage(), str(tmp_path), [])
    found = json.loads((tmp_path / MANIFEST_NAME).read_text())
    del found["crc32c"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(found | {"format_version": version} | fields))

    with pytest.raises(DatasetError, match="restart_markers"):
        Manifest.load(Storage(), str(tmp_path))


def test_the_digest_ignores_who_finished_first_and_sees_every_change() -> None:
    manifest = Manifest.of(TASKS, REPORTS, ())
    changed = [replace(REPORTS[0], entry=replace(ENTRIES[0], index_sha256="cd" * 32)), *REPORTS[1:]]

    assert Manifest.of(TASKS, REPORTS[::-1], ()).digest == manifest.digest
    assert Manifest.of(TASKS, changed, ()).digest != manifest.digest
    assert Manifest.of(TASKS, REPORTS, ("cat",)).digest != manifest.digest


def test_the_digest_is_that_of_a_copy_in_another_store() -> None:
    elsewhere = [
        replace(report, entry=replace(report.entry, etag=f'"{n}"', tar=f"s3://tars/{n}.tar"))
        for n, report in enumerate(REPORTS)
    ]
    copied, manifest = Manifest.of(TASKS, elsewhere, ()), Manifest.of(TASKS, REPORTS, ())

    assert copied.digest == manifest.digest
    assert copied.to_bytes() != manifest.to_bytes()


def test_a_manifest_says_where_tars_lie_that_lie_elsewhere(tmp_path: Path) -> None:
    tars = ["", "raw/part 1.tar", "s3://bucket/laion/00000.tar", "/mnt/tars/a.tar"]
    entries = [ShardEntry(f"part/{n}", 1, 2048, "ab" * 32, tar=tar) for n, tar in enumerate(tars)]
    Manifest(2, "", (), 0, ShardTable.of(entries)).save(Storage(), str(tmp_path), [])

    shards = Manifest.load(Storage(), str(tmp_path)).shards

    assert [shard.tar_url("s3://data/set/") for shard in shards] == [
        "s3://data/set/part/0.tar",
        "s3://data/set/raw/part 1.tar",
        "s3://bucket/laion/00000.tar",
        "/mnt/tars/a.tar",
    ]
    assert [shard.index_url("s3://data/set/") for shard in shards][1] == "s3://data/set/part/1.index"


def test_many_shards_take_little_memory_and_load_as_they_were(tmp_path: Path) -> None:
    """A quarter of the 200,000 that `make bench-plan` loads; 200 bytes of memory each are held."""
    count = 50_000
    names = [f"shard-{n:06d}" for n in range(count)]
    digests = [f"{n:064x}" for n in range(count)]
    etags = [f'"{n:032x}-2"' for n in range(count)]
    table = ShardTable(
        names=names,
        samples=[10_000] * count,
        tar_bytes=[10**9] * count,
        index_sha256=digests,
        key_bytes=[8] * count,
        extension_bytes=[3] * count,
        etags=etags,
        tars=[""] * count,
    )
    Manifest(2, "", (), 0, table).save(Storage(), str(tmp_path), [])

    tracemalloc.start()
    loaded = Manifest.load(Storage(), str(tmp_path))
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert loaded.samples == count * 10_000
    assert loaded.shards[12_345] == ShardEntry(names[12_345], 10_000, 10**9, digests[12_345], etag=etags[12_345])
    assert held_bytes < 10 << 20
    assert peak_bytes < 62 << 20


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"convmae shard SOURCE {tmp_path}"):
        Manifest.load(Storage(), str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"format_version": 2}', b"\xff\xfe", b'{"format_version":2,"shards":[]}']
)
def test_an_unreadable_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)

    with pytest.raises(DatasetError, match="manifest: must be readable"):
        Manifest.load(Storage(), str(tmp_path))


@pytest.mark.parametrize("version", [1, 99])
def test_another_version_is_refused(tmp_path: Path, version: int) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"format_version": version, "shards": [{"name": "a"}]}))

    with pytest.raises(DatasetError, match=f"format_version 2, 3 or 4, got {version}"):
        Manifest.load(Storage(), str(tmp_path))


def test_the_same_ingest_finds_its_manifest_and_another_is_refused(dataset: Dataset, photographs: Path) -> None:
    sources = find_sources(Storage(), str(photographs))

    assert existing_manifest(Storage(), dataset.url, plan_shards(sources, Sharding(13))) == dataset.manifest
    for tasks in (plan_shards(sources, Sharding(14)), plan_shards(sources, Sharding(13, seed=1))):
        with pytest.raises(DatasetError, match="other images or options"):
            existing_manifest(Storage(), dataset.url, tasks)


def test_an_empty_destination_has_no_manifest(tmp_path: Path) -> None:
    assert existing_manifest(Storage(), str(tmp_path), TASKS) is None


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    Manifest.of(TASKS, REPORTS, ("cat", "dog")).save(Storage(), str(tmp_path), [])
    path = tmp_path / MANIFEST_NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])

        with pytest.raises(DatasetError, match="manifest: must"):
            Manifest.load(Storage(), str(tmp_path))


def test_a_manifest_without_a_checksum_is_still_read(tmp_path: Path) -> None:
    manifest = Manifest.of(TASKS, REPORTS, ("cat", "dog"))
    manifest.save(Storage(), str(tmp_path), [])
    fields = json.loads((tmp_path / MANIFEST_NAME).read_text())
    del fields["crc32c"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(fields))

    assert Manifest.load(Storage(), str(tmp_path)) == manifest
