"""Google's and Azure's stores, by their emulators: whole objects, conditional writes, leases."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cloud_emulators import BUCKET, emulator, why_none

from pipeline.errors import LeaseHeldError, StorageError
from pipeline.store import lease
from pipeline.store.storage import Storage

STORAGE = Storage(retry_seconds=20)


@pytest.fixture(scope="module", params=["gs", "az"])
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if reason := why_none(request.param):
        pytest.skip(reason)
    with (
        emulator(request.param, tmp_path_factory.mktemp(request.param)) as environment,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"{request.param}://{BUCKET}"


@pytest.fixture
def folder(bucket: str, tmp_path: Path) -> str:
    return f"{bucket}/{tmp_path.name}"


def test_what_is_written_can_be_read_listed_and_deleted(folder: str, tmp_path: Path) -> None:
    data = os.urandom(1000)
    (tmp_path / "file").write_bytes(data)
    url = f"{folder}/d/x"
    STORAGE.check(folder, write=True, shared=True, exclusive=True)

    STORAGE.write(url, data)
    STORAGE.write(f"{folder}/d/empty", b"")
    STORAGE.upload(tmp_path / "file", f"{folder}/d/e/y")
    STORAGE.download(f"{folder}/d/e/y", tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == data
    assert STORAGE.read(url) == data and STORAGE.size(url) == 1000
    assert STORAGE.read(f"{folder}/d/empty") == b""
    assert STORAGE.read_range(url, 10, 5) == data[10:15]
    assert STORAGE.read_range(url, 990, 50) == data[990:]
    assert STORAGE.read_range(url, 5000, 50) == b""
    assert STORAGE.list_names(f"{folder}/d") == ["e", "empty", "x"]
    assert STORAGE.list_files(f"{folder}/d") == {"e/y": 1000, "empty": 0, "x": 1000}
    STORAGE.delete(url)
    STORAGE.delete(url)
    assert not STORAGE.exists(url) and not STORAGE.exists(f"{folder}/d")
    assert STORAGE.list_names(f"{folder}/nothing") == []
    for call in (STORAGE.read, STORAGE.size):
        with pytest.raises(FileNotFoundError):
            call(url)


def winners(number: int, call: Callable[[int], bool]) -> list[int]:
    """Which of so many threads that begin together learn that they were the one."""
    start, won = threading.Barrier(number), []

    def run(each: int) -> None:
        start.wait()
        if call(each):
            won.append(each)

    threads = [threading.Thread(target=run, args=(each,)) for each in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_of_many_that_create_one_succeeds(folder: str) -> None:
    for turn in range(5):
        url = f"{folder}/created-{turn}"

        (winner,) = winners(8, lambda number, url=url: STORAGE.create(url, b"by %d" % number))

        assert STORAGE.read(url) == b"by %d" % winner
        assert STORAGE.create(url, b"by %d" % winner), "its own answer may have been lost"


def test_of_many_that_replace_one_succeeds(folder: str) -> None:
    for turn in range(5):
        url = f"{folder}/replaced-{turn}"
        STORAGE.write(url, b"old")

        (winner,) = winners(8, lambda number, url=url: STORAGE.replace(url, b"by %d" % number, b"old"))

        assert STORAGE.read(url) == b"by %d" % winner
        assert not STORAGE.replace(url, b"late", b"old")
    with pytest.raises(FileNotFoundError):
        STORAGE.replace(f"{folder}/nothing", b"new", b"old")


def test_a_lease_is_held_by_one_and_taken_over_from_the_dead(folder: str) -> None:
    with lease.hold_lease(STORAGE, folder, "drives", on_wait=pytest.fail, keeps_number=True) as held:
        held.beat()
        threading.Timer(1, held.beat).start()
        with (
            pytest.raises(LeaseHeldError, match="must not be in use by"),
            lease.hold_lease(STORAGE, folder, "drives too", on_wait=lambda text: None, dead_seconds=20),
        ):
            pytest.fail("two held it")
    silent = json.loads(STORAGE.read(f"{folder}/claim-000001.json")) | {"host": "elsewhere", "over": False}
    STORAGE.write(f"{folder}/claim-000002.json", json.dumps(silent).encode())
    watched: list[str] = []
    with lease.hold_lease(STORAGE, folder, "drives", on_wait=watched.append, keeps_number=True, dead_seconds=1) as held:
        held.check()
        assert held.number == 3 and len(watched) == 1


@pytest.mark.parametrize(
    "url",
    [
        "sftp://host/x",
        "ftp://host/x",
        "hdfs://host/x",
        "webhdfs://host/x",
        "hf://datasets/x/y",
        "oss://b/x",
        "oci://b@n/x",
    ],
)
def test_a_store_without_conditional_writes_is_refused_where_only_one_may_write(url: str) -> None:
    name = url.partition(":")[0]
    for call in (
        lambda: STORAGE.check(url, write=True, exclusive=True),
        lambda: STORAGE.create(url, b""),
        lambda: STORAGE.replace(url, b"", b""),
    ):
        with pytest.raises(StorageError, match=f"conditional writes, which {name}:// does not have"):
            call()
