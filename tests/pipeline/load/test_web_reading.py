"""Datasets, tars and images behind a plain web server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pipeline_tars import tar_bytes
from web_server import WebServer, serving

from pipeline.errors import RefusedError, ReplacedError, SourceError, StorageError
from pipeline.ingest.index_tar import IndexTask, index_tar
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.source import Sources, Tars
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load.bad_sample import BadSample
from pipeline.load.dataset import Dataset
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

MakeJpeg = Callable[..., bytes]

STORAGE = Storage(retry_seconds=5.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(folder) as running:
        yield running


@pytest.fixture
def tars(server: WebServer, jpeg: MakeJpeg) -> Tars:
    for number in range(2):
        images = [(f"{number}-{place}.jpg", jpeg(8 * number + place)) for place in range(8)]
        (server.folder / f"{number:05d}.tar").write_bytes(tar_bytes(images))
    found = find_sources(STORAGE, f"{server.address}/{{00000..00001}}.tar")
    assert isinstance(found, Tars)
    return found


@pytest.fixture
def indexed(tars: Tars, tmp_path: Path) -> Dataset:
    tasks = [IndexTask(tars.root, tar, deep=False, salvage=False) for tar in tars.tars]
    reports = [report for task in tasks if (report := index_tar(STORAGE, str(tmp_path), task).report)]
    Manifest.of(tasks, reports, ()).save(STORAGE, str(tmp_path), [])
    return Dataset.open(STORAGE, str(tmp_path))


def test_tars_are_indexed_and_read_where_they_are(indexed: Dataset, jpeg: MakeJpeg) -> None:
    assert [sample.data for sample in indexed.read(np.arange(16))] == [jpeg(number) for number in range(16)]


def test_a_body_that_breaks_off_is_resumed_where_it_ended(server: WebServer) -> None:
    data = np.random.default_rng(0).bytes(5 << 20)
    (server.folder / "x").write_bytes(data)
    server.cut_bodies = 2

    read = STORAGE.read_range(f"{server.address}/x", 1000, 4 << 20)

    assert read == data[1000 : 1000 + (4 << 20)]
    firsts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in server.ranges]
    assert len(firsts) == 3
    assert firsts == sorted(set(firsts))


@pytest.mark.parametrize("knows_if_match", [True, False])
def test_a_tar_that_was_replaced_is_not_read(server: WebServer, indexed: Dataset, knows_if_match: bool) -> None:
    path = server.folder / "00001.tar"
    path.write_bytes(path.read_bytes())
    server.knows_if_match = knows_if_match

    found = indexed.read_each(np.array([0, 8]))

    assert not isinstance(found[0], BadSample)
    assert isinstance(found[1], BadSample)
    assert found[1].fault == "replaced"


def test_a_body_is_not_completed_from_another_version(server: WebServer) -> None:
    (server.folder / "x").write_bytes(bytes(1000))
    etag = STORAGE.etag(f"{server.address}/x")
    (server.folder / "x").write_bytes(bytes(1000))

    with pytest.raises(ReplacedError):
        STORAGE.read_range(f"{server.address}/x", 10, 10, etag)


def test_a_server_without_ranges_is_refused_and_not_misread(server: WebServer) -> None:
    (server.folder / "x").write_bytes(bytes(range(100)))
    server.knows_ranges = False

    assert STORAGE.read_range(f"{server.address}/x", 0, 10) == bytes(range(10))
    with pytest.raises(StorageError, match="must answer ranged requests"):
        STORAGE.read_range(f"{server.address}/x", 10, 10)


def test_ranges_end_where_the_object_does(server: WebServer) -> None:
    (server.folder / "x").write_bytes(bytes(range(100)))

    assert STORAGE.read_range(f"{server.address}/x", 90, 100) == bytes(range(90, 100))
    assert STORAGE.read_range(f"{server.address}/x", 200, 10) == b""


def test_addresses_that_are_gone_or_forbidden_cost_one_image_each(
    server: WebServer, jpeg: MakeJpeg, tmp_path: Path
) -> None:
    (server.folder / "1.jpg").write_bytes(jpeg(1))
    names = ["1.jpg", "gone.jpg", "forbidden.jpg"]
    (tmp_path / "list.txt").write_text("".join(f"{server.address}/{name}\n" for name in names))
    sources = find_sources(STORAGE, str(tmp_path / "list.txt"))
    assert isinstance(sources, Sources)
    (task,) = plan_shards(sources, Sharding(samples_per_shard=10))

    report = write_shard(STORAGE, str(tmp_path / "out"), task)

    assert report.samples == 1
    assert {item.path.rpartition("/")[2]: item.reason for item in report.skipped} == {
        "gone.jpg": "it is gone",
        "forbidden.jpg": "the server answered 403",
    }


def test_a_question_mark_begins_a_query(server: WebServer, tars: Tars) -> None:
    signed = find_sources(STORAGE, f"{tars.root}/{{00000..00001}}.tar?signature=a/b*c")
    (one,) = find_sources(STORAGE, f"{tars.root}/00001.tar?signature=a/b*c").tars

    assert [(tar.path.text, tar.size_bytes) for tar in signed.tars] == [
        (f"{tar.path}?signature=a/b*c", tar.size_bytes) for tar in tars.tars
    ]
    assert one == signed.tars[1]
    with pytest.raises(SourceError, match=r"00002\.tar"):
        find_sources(STORAGE, f"{tars.root}/{{00000..00002}}.tar?signature=a/b*c")


def test_a_missing_tar_of_a_pattern_is_named(server: WebServer, tars: Tars) -> None:
    with pytest.raises(SourceError, match=r"00002\.tar"):
        find_sources(STORAGE, f"{tars.root}/{{00000..00002}}.tar")


def test_a_web_page_is_no_list(server: WebServer) -> None:
    (server.folder / "index.html").write_text("<html><a href='a.tar'>a.tar</a></html>")

    with pytest.raises(SourceError, match="not a web page"):
        find_sources(STORAGE, f"{server.address}/index.html")


def test_a_server_that_is_unreachable_is_not_taken_for_a_missing_object() -> None:
    storage = Storage(retry_seconds=0.2)
    for call in (storage.size, storage.etag, storage.read):
        with pytest.raises(StorageError, match=r"reachable.*check that the server runs \("):
            call("http://127.0.0.1:1/x")


def test_a_refusal_says_what_the_server_said(server: WebServer) -> None:
    with pytest.raises(RefusedError, match="the server answered 403"):
        STORAGE.read(f"{server.address}/forbidden")


def test_nothing_is_written_to_a_web_server(server: WebServer) -> None:
    with pytest.raises(StorageError, match="can be written"):
        STORAGE.check(server.address, write=True)
