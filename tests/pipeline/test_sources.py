from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.sources import find_sources
from pipeline.storage import Storage


def fill(folder: Path, *paths: str) -> str:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"1")
    return str(folder)


def test_class_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    sources = find_sources(Storage(), fill(tmp_path, "dog/2.JPG", "cat/1.png", "cat/deep/0.WebP", "dog/readme.txt"))

    assert sources.classes == ("cat", "dog")
    assert [(image.path, image.label) for image in sources.images] == [
        ("cat/1.png", 0),
        ("cat/deep/0.WebP", 0),
        ("dog/2.JPG", 1),
    ]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    sources = find_sources(Storage(), fill(tmp_path, "b.jpeg", "a.gif", "sub/c.tif"))

    assert sources.classes == ()
    assert [(image.path, image.label) for image in sources.images] == [
        ("a.gif", None),
        ("b.jpeg", None),
        ("sub/c.tif", None),
    ]


def test_what_a_system_left_behind_is_no_image(tmp_path: Path) -> None:
    sources = find_sources(Storage(), fill(tmp_path, "a.jpg", "._a.jpg"))

    assert [image.path for image in sources.images] == ["a.jpg"]


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

    assert [(image.path, image.size_bytes, image.label) for image in images] == [("x/1.jpg", 1, 0), ("y/2.jpg", 2, 1)]
