from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pipeline_tars import tar_bytes

from pipeline.access.places import Listed
from pipeline.errors import SourceError
from pipeline.ingest.source import Source, Tar, Tars
from pipeline.ingest.source_tars import (
    TarImages,
    TarListing,
    TarSummary,
    TarTask,
    class_folders,
    list_tar,
    read_listings,
)
from pipeline.ingest.sources import find_sources
from pipeline.store.storage import Storage


def tars(source: Path | str) -> list[str]:
    found = find_sources(Storage(), str(source))
    assert isinstance(found, Tars)
    assert all(Path(found.root, tar.path.text).stat().st_size == tar.size_bytes for tar in found.tars)
    return [tar.path.text for tar in found.tars]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tars of two to four images."""
    for number in range(3):
        members = [(f"{number}-{n}.jpg", bytes([number, n]) * 600) for n in range(number + 2)]
        labels = [(f"{number}-{n}.cls", b"%d" % (10 * number + n)) for n in range(number + 1)]
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / f"{number:02d}.tar").write_bytes(tar_bytes(members + labels))
    return tmp_path


def test_a_folder_a_tar_a_pattern_and_braces_name_tars(folder: Path) -> None:
    everything = ["part/00.tar", "part/01.tar", "part/02.tar"]

    assert tars(folder) == everything
    assert tars(folder / "part" / "01.tar") == ["01.tar"]
    assert tars(folder / "part" / "*.tar") == ["00.tar", "01.tar", "02.tar"]
    assert tars(folder / "*" / "0[12].tar") == everything[1:]
    assert tars(folder / "part" / "{00..01}.tar") == ["00.tar", "01.tar"]
    assert tars(folder / "part" / "0{2,0}.tar") == ["00.tar", "02.tar"]
    assert tars(f"file://{folder}/part/?2.tar") == ["02.tar"]


def test_folders_with_brackets_in_their_names_are_folders(tmp_path: Path) -> None:
    (tmp_path / "photos [2024]").mkdir()
    (tmp_path / "photos [2024]" / "a.tar").write_bytes(tar_bytes([("a.jpg", b"1")]))

    assert tars(tmp_path / "photos [2024]") == ["a.tar"]


def test_a_tar_that_braces_name_and_is_missing_is_reported(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"part/03\.tar"):
        find_sources(Storage(), str(folder / "part" / "{00..03}.tar"))
    with pytest.raises(SourceError, match="must match at least one tar"):
        find_sources(Storage(), str(folder / "part" / "x*.tar"))


def test_images_and_tars_in_one_folder_must_be_separated_by_the_user(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(b"1")

    with pytest.raises(SourceError, match="not both"):
        find_sources(Storage(), str(folder))


@pytest.mark.parametrize("name", ["a.tar.gz", "b.TGZ", "c.zip"])
def test_compressed_archives_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"1")

    with pytest.raises(SourceError, match="must not be compressed"):
        find_sources(Storage(), str(tmp_path / name))


def test_images_are_ranges_of_their_tars(folder: Path) -> None:
    found = find_sources(Storage(), str(folder))
    assert isinstance(found, Tars)
    summaries = [list_tar(Storage(), str(folder / "work"), TarTask(found.root, tar)) for tar in found.tars]

    images = TarImages(read_listings(Storage(), summaries))

    assert len(images) == 9
    expected = [(number, n, 10 * number + n if n <= number else None) for number in range(3) for n in range(number + 2)]
    assert [(image.read(Storage(), found.root), image.label) for image in images] == [
        (bytes([number, n]) * 600, label) for number, n, label in expected
    ]
    assert images[3] == Source(Listed("part/01.tar"), 1200, 11, images[3].offset)
    assert images[3].name == f"part/01.tar at byte {images[3].offset}"


def listed(folder: Path, tars: Mapping[str, Sequence[str]]) -> list[TarSummary]:
    """Tars of members with these names."""
    summaries = []
    for name, members in tars.items():
        (folder / name).write_bytes(tar_bytes([(member, b"1") for member in members]))
        task = TarTask(str(folder), Tar(Listed(name), (folder / name).stat().st_size))
        summaries.append(list_tar(Storage(), str(folder / "work"), task))
    return summaries


@pytest.mark.parametrize(
    ("tars", "classes"),
    [
        ({"a.tar": ["cat/1.jpg", "dog/1.jpg"]}, {"cat": "cat", "dog": "dog"}),
        ({"a.tar": ["./cat/1.jpg", "./dog/1.jpg"]}, {"cat": "cat", "dog": "dog"}),
        ({"a.tar": ["train/cat/1.jpg", "train/dog/old/1.jpg"]}, {"train/cat": "cat", "train/dog/old": "dog"}),
        ({"a.tar": ["cat/1.jpg", "dog/1.jpg"], "b.tar": ["eel/1.jpg"]}, {"cat": "cat", "dog": "dog", "eel": "eel"}),
        ({"a.tar": ["cat/1.jpg", "dog/1.jpg", "1.jpg"]}, {}),
        ({"a.tar": ["train/1.jpg", "train/dog/1.jpg"]}, {}),
        ({"a.tar": ["cat/1.jpg", "dog/1.jpg", "dog/1.cls"]}, {}),
        ({"a.tar": ["00000/1.jpg"], "b.tar": ["00001/1.jpg"]}, {}),
        ({"a.tar": ["1.jpg"]}, {}),
    ],
    ids=["folders", "dots", "a common folder", "several tars", "beside", "beside below", "labels", "shards", "plain"],
)
def test_folders_in_tars_are_classes_where_they_can_be_nothing_else(
    tmp_path: Path, tars: dict[str, list[str]], classes: dict[str, str]
) -> None:
    assert class_folders(listed(tmp_path, tars)) == classes


def test_images_of_class_folders_have_their_labels(tmp_path: Path) -> None:
    summaries = listed(tmp_path, {"a.tar": ["dog/1.jpg", "cat/1.jpg", "dog/2.jpg"], "b.tar": ["eel/1.jpg"]})

    images = TarImages(read_listings(Storage(), summaries), {"cat": 0, "dog": 1, "eel": 2})

    assert [image.label for image in images] == [1, 0, 1, 2]


def test_a_listing_is_kept_and_a_broken_one_is_made_again(folder: Path) -> None:
    task = TarTask(str(folder), Tar(Listed("part/01.tar"), (folder / "part" / "01.tar").stat().st_size))
    first = list_tar(Storage(), str(folder / "work"), task)

    again = list_tar(Storage(), str(folder / "work"), task)
    Path(first.listing).write_bytes(b"broken")
    third = list_tar(Storage(), str(folder / "work"), task)

    assert [summary.kept for summary in (first, again, third)] == [False, True, False]
    assert first.samples == again.samples == third.samples == 3


def test_a_listing_that_names_another_tar_is_made_again(folder: Path, tmp_path: Path) -> None:
    """Whoever can write into the destination must not choose what tasks read."""
    task = TarTask(str(folder), Tar(Listed("part/01.tar"), (folder / "part" / "01.tar").stat().st_size))
    first = list_tar(Storage(), str(folder / "work"), task)
    true = TarListing.from_bytes(Path(first.listing).read_bytes())
    forged = replace(true, tar=Tar(Listed("/etc/passwd"), task.tar.size_bytes))
    Path(first.listing).write_bytes(forged.to_bytes())

    again = list_tar(Storage(), str(folder / "work"), task)

    assert not again.kept
    assert next(read_listings(Storage(), [again])).tar == task.tar


def test_ten_million_images_take_no_memory_to_speak_of() -> None:
    import tracemalloc

    count, tars_count = 100_000, 100
    column = np.arange(count)
    listing = TarListing(Tar(Listed("a.tar"), 1), column, column, column, (), (), 0, ("",), np.zeros_like(column))

    tracemalloc.start()
    images = TarImages(listing for _ in range(tars_count))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(images) == count * tars_count
    assert images[count * tars_count - 1].offset == count - 1
    assert peak_bytes < 20_000_000
