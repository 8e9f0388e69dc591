from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.load import block_cache
from pipeline.load.block_cache import BlockCache, CachePlace

KILOBYTE = 1000


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(folder: Path, clock: Clock, blocks: int = 4, digest: str = "d" * 64) -> BlockCache:
    """A cache with room for that many blocks of a kilobyte."""
    return BlockCache(CachePlace(str(folder), blocks * KILOBYTE), digest, clock)


def put(cache: BlockCache, *names: str) -> None:
    for name in names:
        cache.put(name, name[0].encode() * KILOBYTE)


def held(cache: BlockCache, names: str) -> str:
    return "".join(name for name in names if cache.holds(name))


def test_parts_of_a_block_come_back(tmp_path: Path, clock: Clock) -> None:
    cache = opened(tmp_path, clock)

    cache.put("a", bytes(range(200)))

    assert cache.get("a", 10, 5) == bytes(range(10, 15))
    assert cache.get("a", 0, 200) == bytes(range(200))
    assert cache.get("a", 198, 50) == bytes([198, 199])
    assert cache.get("b", 0, 1) is None


def test_the_least_recently_used_block_of_epochs_ago_goes_first(tmp_path: Path, clock: Clock) -> None:
    cache = opened(tmp_path, clock)
    cache.begin_epoch()
    put(cache, "a", "b", "c", "d")
    for _ in range(2):
        cache.begin_epoch()
    cache.get("a", 0, 1)
    cache.begin_epoch()

    put(cache, "e", "f")

    assert held(cache, "abcdef") == "adef"
    assert cache.evictions == 2
    assert cache.used_bytes == 4 * KILOBYTE


def test_what_the_last_two_epochs_used_is_not_pushed_out_by_what_passes(tmp_path: Path, clock: Clock) -> None:
    """Six blocks an epoch through a cache for four: four of them are served in every later epoch."""
    cache = opened(tmp_path, clock)
    hits = []
    for order in ("abcdef", "fedcba", "cfbead", "defabc"):
        cache.begin_epoch()
        clock.now += block_cache.RECOUNT_SECONDS
        found = 0
        for name in order:
            if cache.get(name, 0, 1) is None:
                put(cache, name)
            else:
                found += 1
        hits.append(found)

    assert hits == [0, 4, 4, 4]
    assert cache.evictions == 0


def test_blocks_of_other_data_sets_make_room_by_age(tmp_path: Path, clock: Clock) -> None:
    old = opened(tmp_path, clock, digest="e" * 64)
    put(old, "a", "b")
    cache = opened(tmp_path, clock)
    cache.begin_epoch()
    put(cache, "c", "d")
    old.get("b", 0, 1)  # another run is at work with it

    put(cache, "f")

    assert held(old, "ab") == "b"
    assert held(cache, "cdf") == "cdf"
    assert old.get("c", 0, 1) is None


def test_a_lowered_budget_is_kept_to(tmp_path: Path, clock: Clock) -> None:
    put(opened(tmp_path, clock), "a", "b", "c", "d")

    cache = opened(tmp_path, clock, blocks=2)

    assert held(cache, "abcd") in ("d", "cd")


def test_processes_share_one_budget(tmp_path: Path, clock: Clock) -> None:
    first, second = opened(tmp_path, clock), opened(tmp_path, clock)

    put(first, "a", "b")
    put(second, "c", "d", "e")
    put(first, "f")

    assert held(first, "abcdef") == held(second, "abcdef") == "abcd"
    assert first.full
    assert second.get("a", 0, 1) == b"a"


WRITER = """
import sys
from pathlib import Path
from pipeline.load.block_cache import BlockCache, CachePlace
cache = BlockCache(CachePlace(sys.argv[1], 100_000_000), "d" * 64)
number = 0
while True:
    cache.put(str(number), bytes(1_000_000))
    print(number, flush=True)
    number = (number + 1) % 90
"""


def test_a_killed_writer_leaves_no_lock_and_no_half_block(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout
        for _ in range(20):
            writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()

    began = time.monotonic()
    cache = BlockCache(CachePlace(str(tmp_path), 100_000_000), "d" * 64)
    cache.put("new", b"x" * 1000)

    assert time.monotonic() - began < block_cache.LOCK_SECONDS
    assert cache.get("new", 0, 1000) == b"x" * 1000
    blocks = [path for path in (tmp_path / ("d" * 32)).iterdir() if not path.name.startswith(".")]
    assert {path.stat().st_size for path in blocks} == {1_000_000, 1000}


def test_what_dead_writers_left_half_written_is_removed(tmp_path: Path, clock: Clock) -> None:
    opened(tmp_path, clock)
    orphan = tmp_path / ("d" * 32) / ".a.123.456"
    orphan.write_bytes(b"half")
    os.utime(orphan, (clock.now, clock.now))

    opened(tmp_path, clock)
    assert orphan.exists()  # it may still be written
    clock.now += block_cache.ORPHAN_SECONDS
    opened(tmp_path, clock)

    assert not orphan.exists()


@pytest.mark.parametrize("content", [b"", b"12", b"nonsense", None])
def test_a_sum_that_is_lost_is_counted_again(tmp_path: Path, clock: Clock, content: bytes | None) -> None:
    cache = opened(tmp_path, clock)
    put(cache, "a", "b", "c")
    (tmp_path / "used").unlink() if content is None else (tmp_path / "used").write_bytes(content)

    put(cache, "d", "e", "f", "g", "h")

    assert sum(path.stat().st_size for path in (tmp_path / ("d" * 32)).iterdir()) <= 8 * KILOBYTE
    assert opened(tmp_path, clock).used_bytes <= 4 * KILOBYTE


def test_a_lock_that_another_process_keeps_costs_seconds_and_no_block_is_stored(tmp_path: Path, clock: Clock) -> None:
    cache = BlockCache(CachePlace(str(tmp_path), 4 * KILOBYTE), "d" * 64, clock, lock_seconds=0.05)

    with (tmp_path / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        put(cache, "a")
    put(cache, "b")

    assert held(cache, "ab") == "b"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_ends_the_storing_with_one_warning(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    cache = opened(tmp_path, clock)
    put(cache, "a")

    def fail(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        put(cache, "b", "c")
    put(cache, "d")

    assert not cache.storing and cache.full
    assert cache.get("a", 0, 1) == b"a"
    assert held(cache, "abcd") == "a"
    (warning,) = caplog.records
    assert os.strerror(number) in warning.getMessage()
    assert [path.name for path in (tmp_path / ("d" * 32)).iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_text("")

    cache = opened(tmp_path / "file", clock)

    put(cache, "a")
    assert cache.get("a", 0, 1) is None
    assert not cache.storing
    assert cache.used_bytes == 0
