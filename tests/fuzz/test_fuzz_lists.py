"""Lists of images, and patterns of tars, as people and programs write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import Fuzz, reading_only
from hypothesis import strategies as st
from mutations import damaged, texts

from jobs.evaluate.labels import labelled_samples
from pipeline.ingest.braces import MOST_NAMES, expanded
from pipeline.ingest.source import Sources
from pipeline.ingest.sources import find_sources
from pipeline.load.dataset import Dataset
from pipeline.shard.index import IndexRow, ShardIndex
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage

Draw = Callable[[st.SearchStrategy[Any]], Any]

NAMES = (
    "a.jpg",
    "IMG 2020.jpg",
    "cats/1.png",
    "../b.jpg",
    "~/c.jpg",
    "/x/d.webp",
    "s3://b/k.jpg",
    "http://h/a.jpg?x=1",
    "file:///t/a%20b.jpg",
    "caf\u00e9.jpg",
    "a,b.jpg",
    "#1.jpg",
    "x\u2028y.jpg",
    "x\x85y.jpg",
    "x\x0cy.jpg",
    '"q".jpg',
)
LABELS = (
    "0",
    "7",
    "007",
    "-1",
    "1.0",
    "1e3",
    "\u0663",
    "cat",
    "golden retriever",
    "",
    " ",
    str(2**63),
    "9" * 30,
    "label",
)

KEYS = ("0001", "a/b c", "caf\u00e9", "x\u2028y", "x\x85y", " k", "not there")

names = st.one_of(st.sampled_from(NAMES), texts.map(lambda text: f"{text}.jpg"), texts)
labels = st.one_of(st.sampled_from(LABELS), st.integers(0, 1000).map(str), texts)


@st.composite
def lists(draw: Draw) -> bytes:
    """Lines of names, with labels or without; now and then damaged, or in another encoding."""
    lines = []
    for name, label in draw(st.lists(st.tuples(names, labels), max_size=6)):
        between = draw(st.sampled_from(("\t", "\t", " ", "  ", ",", None)))
        lines.append(name if between is None else f"{name}{between}{label}")
    text = draw(st.sampled_from(("\n", "\n", "\r\n", "\r"))).join([*lines, draw(st.sampled_from(("", "# done")))])
    encoding = draw(st.sampled_from(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")))
    data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    return draw(damaged(data)) if draw(st.booleans()) else data


def listed(text: str) -> list[str]:
    """The lines that count, by the words of the documentation: they end at a line feed alone, or behind a return."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_a_list_gives_one_image_a_line_or_is_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    place = tmp_path / "list.txt"

    def list_files(data: bytes) -> None:
        place.write_bytes(data)
        with reading_only(tmp_path):
            found = find_sources(Storage(), str(place))
        assert isinstance(found, Sources)
        lines = listed(data.decode("utf-8-sig"))
        assert len(found.images) == len(lines)
        for image, line in zip(found.images, lines, strict=True):
            assert str(image.path) and str(image.path) in line
            assert image.label is None or (type(image.label) is int and 0 <= image.label < 2**63)
            if found.classes and image.label is not None:
                assert found.classes[image.label] in line

    fuzz(list_files, lists(), batch=150)


@st.composite
def label_lists(draw: Draw) -> bytes:
    """Lines of keys and labels; now and then damaged."""
    seldom = st.integers(0, 7).map(lambda number: number == 7)
    keys = draw(st.lists(st.sampled_from(KEYS[:-1]), min_size=2, max_size=6, unique=True)) + [KEYS[-1]] * draw(seldom)
    lines = [(key, draw(labels if draw(seldom) else st.sampled_from(("cat", "dog", "7")))) for key in keys]
    between = " " if draw(seldom) else "\t"
    text = draw(st.sampled_from(("\n", "\n", "\r\n"))).join([*(f"{key}{between}{label}" for key, label in lines), ""])
    data = text.encode("utf-8", "surrogatepass")
    return draw(damaged(data)) if draw(seldom) else data


def test_a_list_gives_each_key_its_label_or_is_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    rows = [IndexRow(key, 512, 9, 1, 2, 3, -1) for key in KEYS[:-1]]
    index = ShardIndex.from_rows("s", 5000, "", (), rows)
    entry = ShardEntry.of(index)
    Storage().write(entry.index_url(str(tmp_path / "data")), index.to_bytes())
    dataset = Dataset(Storage(), str(tmp_path / "data"), Manifest(2, "digest", (), 0, ShardTable.of([entry])))
    place = tmp_path / "labels.tsv"

    def list_labels(data: bytes) -> None:
        place.write_bytes(data)
        with reading_only(tmp_path):
            found = labelled_samples(dataset, Storage(), str(place))
        parts = [line.partition("\t") for line in listed(data.decode("utf-8-sig"))]
        expected = {key: label.strip() for key, _, label in parts}
        pairs = zip(found.sample_ids.tolist(), found.labels.tolist(), strict=True)
        assert {KEYS[number]: found.classes[label] for number, label in pairs} == expected
        assert found.unlabelled == len(rows) - len(expected)

    fuzz(list_labels, label_lists(), batch=150)


patterns = st.lists(
    st.one_of(
        st.sampled_from(
            (
                "{",
                "}",
                ",",
                "..",
                "{0..9}",
                "{a..z}",
                "{9..0..3}",
                "{1..1000000000}",
                "\\",
                "*",
                "?",
                "[a]",
                "x",
                "/",
                "00",
            )
        ),
        texts,
    ),
    max_size=8,
).map("".join)


def test_a_pattern_stands_for_a_bounded_number_of_names(fuzz: Fuzz, tmp_path: Path) -> None:
    def brace_patterns(pattern: str) -> None:
        count = 0
        for name in expanded(pattern):
            assert isinstance(name, str)
            count += 1
        assert count <= MOST_NAMES

    fuzz(brace_patterns, patterns, batch=100)


def test_a_pattern_finds_tars_below_its_folder_or_is_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    folder = tmp_path / "root"
    (folder / "a").mkdir(parents=True)
    for name in ("0.tar", "1.tar", "a/2.tar", "list.txt"):
        (folder / name).write_bytes(b"")
    (tmp_path / "outside.tar").write_bytes(b"")

    def tar_patterns(pattern: str) -> None:
        source = f"{folder}/{pattern}"
        if ".." in source.split("/"):
            return  # whoever writes it may mean it
        with reading_only(folder):
            found = find_sources(Storage(), source)
        assert {"0.tar", "1.tar", "2.tar", "list.txt"} & {Path(path).name for path in _paths(found)}

    fuzz(tar_patterns, patterns, batch=100)


def _paths(found: Any) -> list[str]:
    return [str(item.path) for item in (found.images if isinstance(found, Sources) else found.tars)] or ["list.txt"]
