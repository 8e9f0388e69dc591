from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.source import Sources
from pipeline.source_lists import sized
from pipeline.sources import find_sources
from pipeline.storage import Storage


def listed(tmp_path: Path, text: str | bytes) -> Sources:
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = find_sources(Storage(), str(tmp_path / "list.txt"))
    assert isinstance(found, Sources)
    return found


def rows(sources: Sources) -> list[tuple[str, int | None]]:
    return [(image.path, image.label) for image in sources.images]


def test_paths_alone_have_no_labels(tmp_path: Path) -> None:
    sources = listed(tmp_path, "# my photos\nb.jpg\n\nsub/a b.png\ns3://bucket/c.jpg\n/abs/d.jpg\n")

    assert rows(sources) == [("b.jpg", None), ("sub/a b.png", None), ("s3://bucket/c.jpg", None), ("/abs/d.jpg", None)]
    assert sources.root == str(tmp_path)


@pytest.mark.parametrize("text", ["a.jpg\t7\nb c.jpg\t0\n", "a.jpg 7\nb c.jpg 0\n", "\ufeffa.jpg\t7\r\nb c.jpg\t0\r\n"])
def test_integers_are_kept_as_labels(tmp_path: Path, text: str) -> None:
    sources = listed(tmp_path, text)

    assert rows(sources) == [("a.jpg", 7), ("b c.jpg", 0)]
    assert sources.classes == ()


def test_names_become_classes_in_sorted_order(tmp_path: Path) -> None:
    sources = listed(tmp_path, "1.jpg\tdog\n2.jpg\tcat\n3.jpg\n4.jpg\tdog\n")

    assert sources.classes == ("cat", "dog")
    assert rows(sources) == [("1.jpg", 1), ("2.jpg", 0), ("3.jpg", None), ("4.jpg", 1)]


@pytest.mark.parametrize(
    "text",
    ["filename,label\na.jpg,3\n", '"a.jpg", "cat"\n', "https://host/a.jpg,3\n", '{"url": "https://host/a.jpg"}\n'],
)
def test_csv_and_json_are_refused_and_not_taken_for_names_of_missing_files(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"not CSV or JSON.*after a tab"):
        listed(tmp_path, text)


def test_commas_and_brackets_in_names_are_no_csv(tmp_path: Path) -> None:
    names = ["a, b.jpg", "a.jpg,b.jpg", "[album]/a.jpg", "https://images/a.jpg,w_200"]

    assert rows(listed(tmp_path, "\n".join(names))) == [(name, None) for name in names]


def test_images_are_read_from_beside_the_list_and_by_url(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"near")
    Storage().write("memory://source-lists/b.jpg", b"far")
    sources = listed(tmp_path, "a.jpg\nmemory://source-lists/b.jpg\n")

    assert [image.read(Storage(), sources.root) for image in sources.images] == [b"near", b"far"]


def test_sizes_are_asked_for_and_a_missing_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")

    storage = Storage(retry_seconds=0.2)
    sources = sized(storage, listed(tmp_path, "a.jpg\ngone.jpg\nhttp://127.0.0.1:1/away.jpg\n"))

    assert [image.size_bytes for image in sources.images] == [5, 0, 0]


@pytest.mark.parametrize("text", ["", "\n# nothing\n"])
def test_an_empty_list_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match="must list at least one image"):
        listed(tmp_path, text)


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="must be a folder, a tar, or a text file"):
        listed(tmp_path, b"\x89PNG\xff\xfe\x00")


def test_a_label_that_no_index_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"a.jpg\t{2**63}\nb.jpg\t1\n")

    with pytest.raises(SourceError, match="label: must be at most 9223372036854775807"):
        find_sources(Storage(), str(tmp_path / "list.txt"))
