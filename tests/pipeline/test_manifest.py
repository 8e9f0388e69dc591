from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.dataset import Dataset
from pipeline.errors import DatasetError
from pipeline.manifest import MANIFEST_NAME, SKIPPED_NAME, Manifest, existing_manifest
from pipeline.shard_index import Skipped
from pipeline.shards import ShardReport, ShardTask, plan_shards
from pipeline.sources import Source, find_sources
from pipeline.storage import Storage

TASKS = [ShardTask(f"shard-{n:06d}", "/photos", 10 * n, (Source(f"{n}.jpg", 5, None),)) for n in range(3)]
REPORTS = [ShardReport(task.name, 10, 2048, "ab" * 32, (), kept=False) for task in TASKS]


def test_a_saved_manifest_loads_as_it_was(tmp_path: Path) -> None:
    manifest = Manifest.of(TASKS, REPORTS, ("cat", "dog"))
    manifest.save(Storage(), str(tmp_path), [Skipped("x.jpg", "cut")])

    loaded = Manifest.load(Storage(), str(tmp_path))

    assert loaded == manifest
    assert loaded.digest == manifest.digest
    assert (loaded.samples, loaded.tar_bytes) == (30, 6144)
    assert json.loads((tmp_path / SKIPPED_NAME).read_text()) == {"path": "x.jpg", "reason": "cut"}


def test_the_digest_ignores_who_finished_first_and_sees_every_change() -> None:
    manifest = Manifest.of(TASKS, REPORTS, ())
    changed = [replace(REPORTS[0], index_sha256="cd" * 32), *REPORTS[1:]]

    assert Manifest.of(TASKS, REPORTS[::-1], ()).digest == manifest.digest
    assert Manifest.of(TASKS, changed, ()).digest != manifest.digest
    assert Manifest.of(TASKS, REPORTS, ("cat",)).digest != manifest.digest


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"convmae shard SOURCE {tmp_path}"):
        Manifest.load(Storage(), str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format_version": 1}', b"\xff\xfe"])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)

    with pytest.raises(DatasetError, match="manifest: must be readable"):
        Manifest.load(Storage(), str(tmp_path))


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    replace(Manifest.of(TASKS, REPORTS, ()), format_version=99).save(Storage(), str(tmp_path), [])

    with pytest.raises(DatasetError, match="format_version 1, got 99"):
        Manifest.load(Storage(), str(tmp_path))


def test_the_same_ingest_finds_its_manifest_and_another_is_refused(dataset: Dataset, photographs: Path) -> None:
    sources = find_sources(Storage(), str(photographs))

    assert existing_manifest(Storage(), dataset.url, plan_shards(sources, 13, seed=0)) == dataset.manifest
    for tasks in (plan_shards(sources, 14, seed=0), plan_shards(sources, 13, seed=1)):
        with pytest.raises(DatasetError, match="other images or options"):
            existing_manifest(Storage(), dataset.url, tasks)


def test_an_empty_destination_has_no_manifest(tmp_path: Path) -> None:
    assert existing_manifest(Storage(), str(tmp_path), TASKS) is None
