"""Folders, lists and URLs made to do harm: what is no image file costs itself, and nothing hangs."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.access.faults import translated
from pipeline.access.places import Given, normal
from pipeline.access.urls import STORES
from pipeline.errors import RefusedError, StorageError
from pipeline.host.local_files import MOST_LEVELS
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.source import Source, Sources
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.shard.index import LARGEST_IMAGE_BYTES
from pipeline.store.storage import Storage

MakeJpeg = Callable[..., bytes]


def skipped_of(source: str, url: str) -> dict[str, str]:
    """Reasons why a single shard of a source skips images."""
    found = find_sources(Storage(), source)
    assert isinstance(found, Sources)
    (task,) = plan_shards(found, Sharding(100))
    return {Path(item.path).name: item.reason for item in write_shard(Storage(), url, task).skipped}


def test_a_huge_file_is_skipped_unread(tmp_path: Path, jpeg: MakeJpeg) -> None:
    """A sparse one of 20 GB takes no disk; to read it whole would end the ingest."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jpg").write_bytes(jpeg(1))
    with (tmp_path / "in" / "huge.jpg").open("wb") as file:
        file.truncate(20 << 30)
    (tmp_path / "list.txt").write_text("in/good.jpg\nin/huge.jpg\n")

    for source in ("in", "list.txt"):
        skipped = skipped_of(str(tmp_path / source), str(tmp_path / f"out of {source}"))
        assert skipped == {"huge.jpg": f"it has more than {LARGEST_IMAGE_BYTES} bytes"}


def test_no_more_is_read_than_an_image_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the size is not known before, as of addresses in a list."""
    monkeypatch.setattr("pipeline.ingest.source.LARGEST_IMAGE_BYTES", 1000)
    storage = Storage()
    asked: list[int] = []

    def read_start(self: Storage, url: str, length: int) -> bytes:
        asked.append(length)
        return bytes(length)

    monkeypatch.setattr(Storage, "read_start", read_start)
    with pytest.raises(RefusedError, match="it has more than 1000 bytes"):
        Source(Given("memory://x/endless.jpg"), None, None).read(storage, "")
    with pytest.raises(RefusedError, match="it has more than 1000 bytes"):
        Source(Given("memory://x/known.jpg"), 1001, None).read(storage, "")
    assert asked == [1001]


def test_the_start_of_an_object_is_read_from_any_store(tmp_path: Path) -> None:
    for url in (str(tmp_path / "x"), "memory://hostile-sources/x"):
        Storage().write(url, b"0123456789")
        assert Storage().read_start(url, 4) == b"0123"
        assert Storage().read_start(url, 40) == b"0123456789"
        assert Storage().read_range(url, 8, 1 << 60) == b"89"
        assert Storage().read_range(url, 1 << 40, 5) == b""


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "socket"])
def test_what_is_no_file_is_skipped(tmp_path: Path, jpeg: MakeJpeg, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe without a writer hangs, and /dev/zero never ends."""
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    place = tmp_path / "odd.jpg"
    with socket.socket(socket.AF_UNIX) as listener:
        match kind:
            case "pipe":
                os.mkfifo(place)
            case "device":
                place = Path("/dev/zero")
            case "link to a device":
                place.symlink_to("/dev/zero")
            case _:
                listener.bind("odd.jpg")
    (tmp_path / "good.jpg").write_bytes(jpeg(1))
    (tmp_path / "list.txt").write_text(f"{place}\ngood.jpg\n")

    skipped = skipped_of(str(tmp_path / "list.txt"), str(tmp_path / "out"))

    assert skipped == {place.name: "it is a pipe, a socket or a device"}
    with pytest.raises(StorageError, match="must be a regular file"):
        Storage().read(str(place))


def test_a_link_to_a_file_is_followed_and_one_to_itself_is_gone(tmp_path: Path, jpeg: MakeJpeg) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg(1))
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "in" / "ring.jpg").symlink_to(tmp_path / "in" / "ring.jpg")

    assert skipped_of(str(tmp_path / "in"), str(tmp_path / "out")) == {"ring.jpg": "it is gone"}


def test_folders_in_each_other_are_refused_beyond_any_use(tmp_path: Path, jpeg: MakeJpeg) -> None:
    deep = tmp_path.joinpath(*["d"] * MOST_LEVELS)
    deep.mkdir(parents=True)
    (deep / "x.jpg").write_bytes(jpeg(1))
    assert list(Storage().list_files(str(tmp_path))) == ["d/" * MOST_LEVELS + "x.jpg"]

    for _ in range(20):
        deep /= "d"
        deep.mkdir()
    with pytest.raises(StorageError, match="must be at most 100 levels deep"):
        find_sources(Storage(), str(tmp_path))


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "dir://x",
        "reference://x",
        "generic://file:///etc/passwd",
        "github://a:b@c/d",
        "data://,x",
        "zip:///etc/passwd",
        "tar://x",
        "libarchive://x",
        "git://x",
        "asynclocal:///etc/passwd",
        "simplecache::file:///etc/passwd",
        "cached://x",
        "jupyter://x",
        "gopher://x",
    ],
)
def test_what_is_no_store_is_an_unknown_protocol(url: str) -> None:
    for use in (Storage().read, Storage().exists, Storage().list_files, normal):
        with pytest.raises(StorageError, match="must have a known protocol"):
            use(url)


@pytest.mark.parametrize("protocol", sorted(STORES.keys() - {"file", "local", "memory", "s3", "s3a"}))
def test_every_promised_store_is_opened_or_says_what_it_lacks(
    protocol: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Servers are named in the URL, which fsspec's file systems must be given."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setattr("gcsfs.retry.random.random", lambda: -32.0)  # its pauses grow to half a minute

    with pytest.raises((StorageError, OSError)) as refused:
        Storage(retry_seconds=0.1).exists(f"{protocol}://127.0.0.1:1/x/y")
    assert "TypeError" not in str(refused.value)
    if isinstance(refused.value, StorageError):
        assert refused.value.rule in ("needs a package that is not installed", "must be reachable")
        assert "AWS_" not in refused.value.remedy
    libraries = [record for record in caplog.records if not record.name.startswith("pipeline.")]
    assert not libraries, "one line, without a library's traceback"


@pytest.mark.parametrize("url", ["a\0b", "s3://bucket/a\0b", "memory://a\0b/c", "http://host/\0"])
def test_a_url_with_nul_is_refused(url: str) -> None:
    for use in (Storage().read, Storage().exists, Storage().size, normal):
        with pytest.raises(StorageError, match="must hold no NUL"):
            use(url)


def test_a_path_that_is_too_long_is_refused_in_short(tmp_path: Path) -> None:
    for name in ("a" * 5000, "a" * 300, "/".join(["a" * 200] * 40)):
        for use in (Storage().read, Storage().exists, Storage().size):
            with pytest.raises(StorageError, match="must be short enough") as refused:
                use(str(tmp_path / name))
            assert len(str(refused.value)) < 300


def test_links_in_a_ring_count_as_nothing() -> None:
    assert isinstance(translated(OSError(errno.ELOOP, "loop"), "/x"), FileNotFoundError)
