"""Manifests, indexes and pages with sums that fit, whatever they say: refused by name, or one fault each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from fuzzing import Fuzz, reading_only
from hypothesis import strategies as st
from mutations import changed_values, damaged, json_documents
from odd_files import picture

from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load.dataset import Dataset
from pipeline.shard.index import ShardIndex
from pipeline.shard.index_pages import HEAD, Pages, row_type
from pipeline.shard.manifest import Manifest
from pipeline.shard.pixel_statistics import PixelStatistics
from pipeline.shard.verify import verify_shard
from pipeline.store.parted_journal import PartedJournal
from pipeline.store.storage import Storage

Draw = Callable[[st.SearchStrategy[Any]], Any]

JOURNAL = {"format": 1, "content": "abc", "token": "1-2", "parts": [{"number": 1, "bytes": 5, "crc32c": 7, "tag": "x"}]}


def sealed(body: bytes) -> bytes:
    """JSON with the checksum that a manifest ends in."""
    return body[:-1] + b',"crc32c":"%08x"}' % google_crc32c.value(body)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of seven images in two shards."""
    folder = tmp_path_factory.mktemp("fuzzed")
    for number in range(7):
        path = folder / "photographs" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "JPEG"))
    storage, url = Storage(), str(folder / "data")
    sources = find_sources(storage, str(folder / "photographs"))
    tasks = plan_shards(sources, Sharding(4))
    reports = [write_shard(storage, url, task) for task in tasks]
    pixels = PixelStatistics(4, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    Manifest.of(tasks, reports, sources.classes).measured(pixels).save(storage, url, [])
    return Path(url)


def look_at(folder: Path) -> None:
    """Open a dataset, read all of it, and verify it."""
    storage = Storage()
    dataset = Dataset.open(storage, str(folder))
    entries = list(dataset.manifest.shards)[:3]
    for entry in entries:
        verdict = verify_shard(storage, str(folder), entry, deep=True)
        assert all(fault.line for fault in verdict.faults)
    few = range(min(dataset.samples, 20))
    for found in dataset.read_each(list(few)) if few else []:
        assert found.id in few
    assert len(dataset.rows(list(few))) == len(few)


def test_a_manifest_says_what_can_be_or_is_refused(fuzz: Fuzz, sound: Path, tmp_path: Path) -> None:
    fields = json.loads((sound / "manifest.json").read_text())
    del fields["crc32c"]
    folder = tmp_path / "data"
    folder.mkdir()
    for path in sound.iterdir():
        if path.name != "manifest.json":
            (folder / path.name).write_bytes(path.read_bytes())
    changed = changed_values(fields).map(lambda value: json.dumps(value).encode())

    def manifests(data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        with reading_only(folder):
            loaded = Manifest.load(Storage(), str(folder))
        assert Manifest.load(Storage(), str(folder)).digest == loaded.digest
        assert loaded.samples >= 0 and loaded.tar_bytes >= 0
        look_at(folder)

    fuzz(manifests, st.one_of(changed.map(sealed), changed, json_documents(fields)), batch=50)


@st.composite
def indexes(draw: Draw, index: ShardIndex) -> bytes:
    """An index whose pages and footer have sums that fit, whatever they say."""
    table = index.table.copy()
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(table.dtype.names))
        kind = table.dtype[name]
        value: Any = draw(st.binary(max_size=kind.itemsize))
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            value = draw(st.one_of(st.integers(int(limits.min), int(limits.max)), st.integers(-1, 11000))) % (
                int(limits.max) + 1
            )
        table[draw(st.integers(0, len(table) - 1))][name] = value
    whole = index.to_bytes()
    (whole_footer_bytes, _) = struct.unpack("<II", whole[-8:])
    footer = draw(changed_values(json.loads(whole[-8 - whole_footer_bytes : -8]), most=2))
    footer_bytes = json.dumps(footer, sort_keys=True, separators=(",", ":")).encode()
    pages = Pages(len(table), table.dtype, index.digest).encode(table)
    data = HEAD + pages + footer_bytes + struct.pack("<II", len(footer_bytes), google_crc32c.value(footer_bytes))
    return draw(damaged(data)) if draw(st.integers(0, 3)) == 0 else data


def test_an_index_says_what_can_be_or_is_refused(fuzz: Fuzz, sound: Path, tmp_path: Path) -> None:
    for path in sound.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    place = next(iter(sorted(tmp_path.glob("*.index"))))
    whole = ShardIndex.from_bytes(place.read_bytes(), str(place))

    def shard_indexes(data: bytes) -> None:
        place.write_bytes(data)
        with reading_only(tmp_path):
            look_at(tmp_path)
        index = ShardIndex.from_bytes(data, str(place))
        assert index.to_bytes() == data

    fuzz(shard_indexes, indexes(whole), batch=40)


def test_pages_are_those_of_their_place_or_refused(fuzz: Fuzz) -> None:
    pages = Pages(150, row_type(9, 3), "ab" * 32)
    rows = np.zeros(150, pages.row_type)
    rows["key"] = [b"%09d" % number for number in range(150)]
    data = pages.encode(rows)

    def index_pages(given: tuple[bytes, int, int]) -> None:
        changed, first, count = given
        last = min(first + count, pages.count)
        start, length = pages.range(first, last)
        held = changed[start - len(HEAD) : start - len(HEAD) + length]
        found = pages.decode(held, first, last, "x.index")
        assert np.array_equal(np.concatenate([*found, rows[:0]]), rows[64 * first : 64 * last])

    fuzz(index_pages, st.tuples(damaged(data), st.integers(0, 2), st.integers(0, 3)), batch=200)


def test_a_journal_of_parts_is_one_or_counts_for_nothing(fuzz: Fuzz, tmp_path: Path) -> None:
    def parted_journals(data: bytes) -> None:
        (tmp_path / ".x.safetensors.parts.json").write_bytes(data)
        journal = PartedJournal(Storage(), str(tmp_path / "x.safetensors"), "abc")
        assert journal.written_bytes >= 0
        journal.abandon()

    fuzz(parted_journals, json_documents(_journal()), batch=50)


def _journal() -> Mapping[str, Any]:
    from dataclasses import fields

    from pipeline.store.parted_write import WrittenPart

    values = {"number": 1, "bytes": 5, "crc32c": 7, "crc": 7, "tag": "x", "etag": "x"}
    part = {field.name: values.get(field.name, 1) for field in fields(WrittenPart)}
    return {**JOURNAL, "parts": [part]}
