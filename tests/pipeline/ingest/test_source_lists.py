from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.ingest.source import Sources
from pipeline.ingest.source_lists import sized
from pipeline.ingest.sources import find_sources
from pipeline.store.storage import Storage


def listed(tmp_path: Path, text: str | bytes) -> Sources:
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = find_sources(Storage(), str(tmp_path / "list.txt"))
    assert isinstance(found, Sources)
    return found


def rows(sources: Sources) -> list[tuple[str, int | None]]:
    return [(image.path.text, image.label) for image in sources.images]


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

    with pytest.raises(SourceError, match="label in line 1: must be at most 9223372036854775807"):
        find_sources(Storage(), str(tmp_path / "list.txt"))


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    names = ["a\x0cb.jpg", "a\x85b.jpg", "a\u2028b.jpg", "a\x0bb.jpg", "a\x1cb.jpg", "\u00a0a.jpg\u00a0"]

    for end in ("\n", "\r\n"):
        assert rows(listed(tmp_path, end.join(names))) == [(name, None) for name in names]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.jpg\rb.jpg\r", r"line 1: must end in \\n or \\r\\n, and hold no other \\r, got 'a.jpg\\rb.jpg'.*tr '"),
        ("b.jpg\na\rb.jpg\n", "line 2: must end in"),
        ("path\tlabel\na.jpg\t1\n", "line 1: must be of an image, and not name the columns.*remove the line"),
        ("# made today\n\nImage_Path\na.jpg\n", "line 3: must be of an image"),
        ("a.jpg\t1\nb.jpg\tcat\nc.jpg\n", "label in line 2: must be an integer as in line 1.*'cat'.*sorted as text"),
        ("a.jpg\tcat\nb.jpg\tcat\nc.jpg\t7\n", "label in line 1: must be an integer as in line 3"),
        ("a.jpg\t1\nb.jpg\t-1\n", "label in line 2: must be an integer of at least 0, or a name, got '-1'"),
        ("a.jpg\t1.0\nb.jpg\t2.0\n", "label in line 1: must be an integer of at least 0, or a name, got '1.0'"),
        ("a.jpg\t+1\n", "label in line 1: must be an integer"),
        ("a.jpg\t1e3\n", "label in line 1: must be an integer"),
        ("a.jpg\t1_0\n", "label in line 1: must be an integer"),
        ("a.jpg\t1\t2\n", "line 1: must have a path and one label"),
        ("a.jpg\n\t1\n", "line 2: must begin with a path or URL"),
        ("dir/\n", "line 1: must name a file, not a folder"),
        ("a\0.jpg\n", "line 1: must hold no NUL"),
        ("C:\\photos\\a.jpg\t1\n", "line 1: must be a path of Linux or a URL"),
        ('"a.jpg"\t1\n', "line 1: must be a path or URL, not CSV"),
        ("a.jpg\ns3:/b/c.jpg\n", "line 2: must have two slashes.*write s3://b/c.jpg"),
        ("a.jpg\ngopher://b/c.jpg\n", "line 2: must have a known protocol"),
        ("s3://AKIA:hush@bucket/x.jpg\n", "line 1: must hold no credentials"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused_by_its_number(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SourceError, match=says) as refused:
        listed(tmp_path, text)

    assert "hush" not in str(refused.value)


def test_names_that_only_look_like_numbers_are_names(tmp_path: Path) -> None:
    assert listed(tmp_path, "a.jpg\tnan\nb.jpg\t3-toed sloth\n").classes == ("3-toed sloth", "nan")


def test_a_tilde_is_the_home_folder_in_front_of_a_slash_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for path, data in (("home/a.jpg", b"home"), ("~b.jpg", b"near")):
        (tmp_path / path).write_bytes(data)

    sources = listed(tmp_path, "~/a.jpg\n~b.jpg\n")

    assert [image.read(Storage(), sources.root) for image in sources.images] == [b"home", b"near"]


def test_a_path_relative_to_a_list_in_a_store_may_lead_upwards_in_it() -> None:
    storage, places = Storage(), {"u/lists/x/list.txt": b"../../a.jpg\n./b//c.jpg\nd.jpg\n"}
    places |= {"u/a.jpg": b"a", "u/lists/x/b//c.jpg": b"c", "u/lists/x/d.jpg": b"d"}
    for path, data in places.items():
        storage.write(f"memory://{path}", data)
    sources = find_sources(storage, "memory://u/lists/x/list.txt")

    assert isinstance(sources, Sources)
    assert [image.read(storage, sources.root) for image in sources.images] == [b"a", b"c", b"d"]


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "~/a.jpg", "LOCAL:///etc/passwd"])
def test_a_list_in_a_store_does_not_lead_to_files_of_this_machine(path: str) -> None:
    Storage().write("memory://strangers/list.txt", f"a.jpg\n{path}\n".encode())

    with pytest.raises(SourceError, match="line 2: must not lead from memory://strangers to files of this machine"):
        find_sources(Storage(), "memory://strangers/list.txt")


def test_a_list_does_not_lead_out_of_its_bucket_by_a_relative_path() -> None:
    Storage().write("memory://one/list.txt", b"../../other/a.jpg\n")

    with pytest.raises(SourceError, match="line 1: must lead to a place in the store"):
        find_sources(Storage(), "memory://one/list.txt")
