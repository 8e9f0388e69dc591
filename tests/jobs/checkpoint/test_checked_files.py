"""Checked reads of byte ranges, chunk by chunk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from committed import save
from zero_material import upload_files

from jobs.checkpoint import checked_files, checkpoint
from jobs.checkpoint.checked_files import CheckedFiles, Copy
from jobs.checkpoint.deepspeed_files.torch_archive import ByteRange
from jobs.errors import DamagedCheckpointError
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

CHUNK_BYTES = 100
CONTENTS = {"a": os.urandom(1234), "b": b"", "c": os.urandom(700), "d": os.urandom(1)}


class NotingStorage(Storage):
    """Remembers the ranges that were read."""

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        self.reads.append((Path(url).name, offset, length))
        return super().read_range(url, offset, length, etag)

    @property
    def reads(self) -> list[tuple[str, int, int]]:
        reads: list[tuple[str, int, int]] = self.__dict__.setdefault("noted", [])
        return reads


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckedFiles:
    monkeypatch.setattr(checked_files, "READ_BYTES", 3 * CHUNK_BYTES)
    run = RunDirectory.of(NotingStorage(), str(tmp_path / "runs"), "first")
    (tmp_path / "local").mkdir()
    for name, data in CONTENTS.items():
        (tmp_path / "local" / name).write_bytes(data)
    commit = save(run, tmp_path / "local", 5)
    files = upload_files(run, 5, tmp_path / "local", chunk_bytes=CHUNK_BYTES)
    return CheckedFiles(run, replace(commit, files=tuple(files)))


def url(files: CheckedFiles, name: str) -> str:
    return checkpoint.file_url(files.run, 5, name)


def reads(files: CheckedFiles) -> list[tuple[str, int, int]]:
    noted: Any = files.run.storage
    return sorted(noted.reads)


def copied(files: CheckedFiles, *ranges: tuple[str, int, int]) -> list[bytes]:
    targets = [bytearray(length) for _, _, length in ranges]
    files.read_into(
        Copy(url(files, name), offset, memoryview(target))
        for (name, offset, _), target in zip(ranges, targets, strict=True)
    )
    return [bytes(target) for target in targets]


def flip(path: str, offset: int) -> None:
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 1
    Path(path).write_bytes(data)


def test_ranges_come_whole_in_any_order_and_may_overlap(files: CheckedFiles) -> None:
    generator = np.random.default_rng(0)
    ranges = []
    for _ in range(50):
        name = str(generator.choice(["a", "c", "d"]))
        start, stop = sorted(generator.integers(0, len(CONTENTS[name]) + 1, 2).tolist())
        ranges.append((name, start, stop - start))

    assert copied(files, *ranges) == [CONTENTS[name][start : start + length] for name, start, length in ranges]


def test_chunks_that_touch_are_read_at_once_up_to_a_bound(files: CheckedFiles) -> None:
    copied(files, ("a", 250, 10), ("a", 290, 500), ("c", 699, 1), ("d", 0, 1))

    # At the end of a file one byte more: is the file as long as it should be?
    assert reads(files) == [("a", 200, 300), ("a", 500, 300), ("c", 600, 101), ("d", 0, 2)]
    expected = np.zeros(13 + 7 + 1, np.bool_)
    expected[[2, 3, 4, 5, 6, 7, 13 + 6, 13 + 7]] = True
    assert (files.checked == expected).all()


def test_chunks_by_number_are_read_for_their_checksums(files: CheckedFiles) -> None:
    files.check(np.array([11, 12, 13, 14, 20]))

    assert reads(files) == [("a", 1100, 135), ("c", 0, 200), ("d", 0, 2)]
    assert np.flatnonzero(files.checked).tolist() == [11, 12, 13, 14, 20]


def test_small_reads_in_one_chunk_are_one_request(files: CheckedFiles) -> None:
    assert files.read_range(url(files, "a"), 1210, 4) == CONTENTS["a"][1210:1214]
    assert files.read_range(url(files, "a"), 1230, 50) == CONTENTS["a"][1230:]

    assert reads(files) == [("a", 1200, 35)]


def test_what_was_altered_is_named_with_its_place_and_only_where_it_is_read(files: CheckedFiles) -> None:
    flip(url(files, "a"), 950)

    copied(files, ("a", 0, 900), ("a", 1000, 234))
    with pytest.raises(DamagedCheckpointError, match=r"altered at 900 or in the 100 bytes from there.*/a'"):
        copied(files, ("a", 899, 2))
    with pytest.raises(DamagedCheckpointError, match="altered at 900"):
        files.read_range(url(files, "a"), 910, 4)

    assert np.flatnonzero(~files.checked).tolist() == [9, *range(13, 21)]


def test_a_file_that_ends_early_or_is_missing_is_named(files: CheckedFiles) -> None:
    os.truncate(url(files, "a"), 1233)
    Path(url(files, "c")).unlink()

    with pytest.raises(DamagedCheckpointError, match=r"it has 1233 bytes, not 1234.*/a'"):
        copied(files, ("a", 1200, 1))
    with pytest.raises(DamagedCheckpointError, match=r"it is missing.*/c'"):
        copied(files, ("c", 0, 1))


def test_a_file_that_is_longer_is_found_where_its_end_is_read(files: CheckedFiles) -> None:
    os.truncate(url(files, "c"), 701)

    copied(files, ("c", 0, 600))
    with pytest.raises(DamagedCheckpointError, match=r"it has 701 bytes, not 700.*/c'"):
        copied(files, ("c", 650, 1))


@pytest.mark.parametrize("parts", [1, 2, 3, 21, 40])
def test_copies_are_dealt_by_chunks_so_that_each_is_read_once(files: CheckedFiles, parts: int) -> None:
    wanted = [("a", 30, 500), ("a", 720, 514), ("c", 0, 700), ("d", 0, 1), ("a", 400, 10)]
    targets = [bytearray(length) for _, _, length in wanted]
    chunks = files.holding(ByteRange(url(files, name), offset, length) for name, offset, length in wanted)

    for part in np.array_split(chunks, parts):
        if len(part):
            copies = [Copy(url(files, n), o, memoryview(t)) for (n, o, _), t in zip(wanted, targets, strict=True)]
            files.read_into(files.clipped(copies, int(part[0]), int(part[-1])))

    assert chunks.tolist() == [*range(6), *range(7, 13), *range(13, 20), 20]
    assert [bytes(target) for target in targets] == [CONTENTS[n][o : o + length] for n, o, length in wanted]
    read = [chunk for _, offset, length in reads(files) for chunk in range(offset // 100, -(-(offset + length) // 100))]
    assert len(read) <= len(chunks) + 3  # the byte behind an end
