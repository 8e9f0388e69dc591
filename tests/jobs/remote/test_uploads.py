from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.remote.uploads import upload
from pipeline.errors import SourceError
from pipeline.store.storage import Storage

URL = "memory://uploads/{}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two class folders, and a name that must be quoted in a URL."""
    for name in ("cat/1.jpg", "cat/ü #?.jpg", "dog/deep/2.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(name.encode())
    return tmp_path / "photos"


def test_a_folder_arrives_completely_under_its_names(folder: Path) -> None:
    told: list[tuple[int, int, int]] = []
    url = URL.format("whole")

    done = upload(Storage(), str(folder), url, lambda *figures: told.append(figures))

    assert {name: Storage().read(f"{url}/{name}") for name in Storage().list_files(url)} == {
        name: name.encode() for name in ("cat/1.jpg", "cat/ü #?.jpg", "dog/deep/2.jpg")
    }
    assert (done.url, done.files, done.kept) == (url, 3, 0)
    assert done.bytes == sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    assert told[0] == (0, 3, 0) and told[-1] == (3, 3, done.bytes)


def test_a_tar_is_one_file_and_its_url_is_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"tar")

    done = upload(Storage(), str(tmp_path / "a.tar"), URL.format("tar"), lambda *_: None)

    assert done.url == URL.format("tar") + "/a.tar"
    assert Storage().read(done.url) == b"tar"


@pytest.mark.parametrize("source", ["none-such", "list.txt", "s3://bucket/photos"])
def test_a_source_that_is_neither_folder_nor_tar_of_this_machine_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "list.txt").write_text("/photos/1.jpg\n")
    place = source if "://" in source else str(tmp_path / source)

    with pytest.raises(SourceError, match="source: must be a folder or a tar on this machine"):
        upload(Storage(), place, URL.format("none"), lambda *_: None)


def test_a_target_on_a_disk_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--upload: must be the URL of a store"):
        upload(Storage(), str(folder), str(tmp_path / "copy"), lambda *_: None)


def test_only_missing_changed_and_newer_files_are_sent_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*.jpg")}
    there = {name: (size, 1000.0) for name, size in sizes.items()}
    for path in folder.rglob("*.jpg"):
        os.utime(path, (900, 900))
    os.utime(folder / "cat/1.jpg", (1100, 1100))  # of the same size, but written since
    there["dog/deep/2.jpg"] = (1, 1000.0)
    sent: list[str] = []
    monkeypatch.setattr("jobs.remote.uploads.written_at", lambda storage, url: there)
    monkeypatch.setattr(Storage, "upload", lambda self, path, url: sent.append(Path(path).name))

    done = upload(Storage(), str(folder), URL.format("again"), lambda *_: None)

    assert sorted(sent) == ["1.jpg", "2.jpg"]
    assert (done.files, done.kept) == (3, 1)
