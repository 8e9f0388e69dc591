from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.ingest.sources import find_sources
from pipeline.store.storage import Storage


def fill(folder: Path, *paths: str) -> str:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"1")
    return str(folder)


def test_class_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    sources = find_sources(Storage(), fill(tmp_path, "dog/2.JPG", "cat/1.png", "cat/deep/0.WebP", "dog/readme.txt"))

    assert sources.classes == ("cat", "dog")
    assert [(image.path.text, image.label) for image in sources.images] == [
        ("cat/1.png", 0),
        ("cat/deep/0.WebP", 0),
        ("dog/2.JPG", 1),
    ]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    sources = find_sources(Storage(), fill(tmp_path, "b.jpeg", "a.gif", "sub/c.tif"))

    assert sources.classes == ()
    assert [(image.path.text, image.label) for image in sources.images] == [
        ("a.gif", None),
        ("b.jpeg", None),
        ("sub/c.tif", None),
    ]


def test_images_beside_class_folders_are_reported_since_they_cost_all_labels(tmp_path: Path) -> None:
    sources = find_sources(Storage(), fill(tmp_path, "cat/1.jpg", "dog/1.jpg", "stray.jpg"))
    flat = find_sources(Storage(), fill(tmp_path / "flat", "1.jpg", "2.jpg"))

    assert sources.beside_classes == ("stray.jpg",)
    assert [image.label for image in sources.images] == [None, None, None]
    assert flat.beside_classes == ()


def test_what_a_system_left_behind_is_no_image(tmp_path: Path) -> None:
    sources = find_sources(Storage(), fill(tmp_path, "a.jpg", "._a.jpg"))

    assert [image.path.text for image in sources.images] == ["a.jpg"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="missing or empty") as caught:
        find_sources(Storage(), str(tmp_path / "nowhere"))
    assert caught.value.value == str(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="missing or empty"):
        find_sources(Storage(), str(tmp_path))


def test_a_folder_without_images_says_what_it_saw(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"2 files are a\.txt, b\.pdf"):
        find_sources(Storage(), fill(tmp_path, "a.txt", "b.pdf"))


def test_sources_on_a_url_have_paths_below_it() -> None:
    storage = Storage()
    storage.write("memory://sources-test/x/1.jpg", b"1")
    storage.write("memory://sources-test/y/2.jpg", b"22")

    images = find_sources(storage, "memory://sources-test/").images

    found = [(image.path.text, image.size_bytes, image.label) for image in images]
    assert found == [("x/1.jpg", 1, 0), ("y/2.jpg", 2, 1)]


def test_linked_folders_are_followed_and_links_upwards_end(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", "1.jpg", "deep/2.jpg")
    photos = tmp_path / "photos"
    fill(photos, "cat/0.jpg")
    (photos / "dog").symlink_to(elsewhere, target_is_directory=True)
    (photos / "cat" / "up").symlink_to(photos, target_is_directory=True)

    sources = find_sources(Storage(), str(photos))

    assert [(image.path.text, image.label) for image in sources.images] == [
        ("cat/0.jpg", 0),
        ("dog/1.jpg", 1),
        ("dog/deep/2.jpg", 1),
    ]


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    sources = find_sources(Storage(), fill(tmp_path, "cat/1.jpg", ".thumbnails/1.jpg", "cat/.cache/1.jpg"))

    assert sources.classes == ("cat",)
    assert [image.path.text for image in sources.images] == ["cat/1.jpg"]


def test_pipes_are_not_opened_and_links_to_nowhere_are_sources(tmp_path: Path) -> None:
    """The latter are skipped later, and reported; a pipe would be waited for without end."""
    fill(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone")

    sources = find_sources(Storage(), str(tmp_path))

    assert [(image.path.text, image.size_bytes) for image in sources.images] == [("1.jpg", 1), ("nowhere.jpg", 0)]


def test_files_that_are_no_images_by_name_are_reported(tmp_path: Path) -> None:
    images = find_sources(Storage(), fill(tmp_path / "a", "1.jpg", "2.jp2", "3.heic", ".DS_Store"))
    tars = find_sources(Storage(), fill(tmp_path / "b", "1.tar", "2.tar.gz", "1.parquet"))

    assert images.skipped_files == ("2.jp2", "3.heic")
    assert tars.skipped_files == ("2.tar.gz",)
