"""A file in memory: what is written is read by its path, and it ends with its owner."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
from pathlib import Path

import pytest

from pipeline.host.memory_file import MemoryFile
from pipeline.store.storage import Storage


def descriptors(name: str) -> int:
    """How many of this process's open files are memory files of that name."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # other tests' files close meanwhile
            found += str(path.readlink()).startswith(f"/memfd:{name}")
    return found


def test_what_is_written_is_read_by_its_path(tmp_path: Path) -> None:
    file = MemoryFile("test", 3_000_000)
    assert file.path.stat().st_size == file.size == 3_000_000
    assert file.path.read_bytes() == bytes(3_000_000)

    file.memory[1_000_000:1_000_004] = b"here"

    Storage().upload(file.path, str(tmp_path / "copy"))
    copy = (tmp_path / "copy").read_bytes()
    assert (len(copy), copy.index(b"here")) == (3_000_000, 1_000_000)


def test_another_process_of_the_same_user_reads_it() -> None:
    file = MemoryFile("test", 4)
    file.memory[:] = b"here"

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(Path.read_bytes, (file.path,)) == b"here"


def test_it_takes_no_descriptor_after_its_end() -> None:
    file = MemoryFile("ending", 4)
    assert descriptors("ending") > 0

    del file
    gc.collect()

    assert descriptors("ending") == 0


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        MemoryFile("test", 0)
