"""Which samples are labelled, how they are divided, and which datasets do not go together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_data import STORAGE, labelled_dataset

from jobs.errors import EvaluationError
from jobs.evaluate.labels import LabelledSamples, divided, labelled_samples, matched
from pipeline.load.dataset import Dataset
from pipeline.shard.index import IndexRow, ShardIndex
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable


def numbered(folder: Path, labels: list[int], classes: tuple[str, ...] = ()) -> Dataset:
    """A dataset of indexes alone, with labels as other tools write them."""
    url, entries = str(folder), []
    for shard in range(0, len(labels), 4):
        rows = [
            IndexRow(f"k{shard + place}", 512, 9, 1, 2, 3, label)
            for place, label in enumerate(labels[shard : shard + 4])
        ]
        index = ShardIndex.from_rows(f"s{shard}", 5000, "", (), rows)
        entries.append(ShardEntry.of(index))
        STORAGE.write(entries[-1].index_url(url), index.to_bytes())
    Manifest(2, "digest", classes, 0, ShardTable.of(entries)).save(STORAGE, url, [])
    return Dataset.open(STORAGE, url)


def samples(labels: list[int], classes: tuple[str, ...], *, is_named: bool = True) -> LabelledSamples:
    ids = np.arange(len(labels))
    return LabelledSamples("somewhere", "digest", classes, ids, np.array(labels), 0, is_named)


def test_labels_are_those_of_the_samples_and_names_those_of_the_folders(dataset: Dataset) -> None:
    found = labelled_samples(dataset, STORAGE)

    assert found.classes == ("ant", "bee", "cat", "dog")
    assert found.labels.tolist() == [sample.label for sample in dataset.read(np.arange(61))]
    assert (len(found), found.unlabelled) == (61, 0)


def test_numbers_are_names_where_there_are_none_and_samples_without_a_label_are_counted(tmp_path: Path) -> None:
    found = labelled_samples(numbered(tmp_path, [7, -1, 11, 7, -1, 2]), STORAGE)

    assert found.classes == ("2", "7", "11")
    assert found.sample_ids.tolist() == [0, 2, 3, 5]
    assert found.labels.tolist() == [1, 2, 1, 0]
    assert found.unlabelled == 2


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path) -> None:
    found = labelled_samples(numbered(tmp_path, [0, 1], ("caf\u00e9", "caf\udce9")), STORAGE)

    assert found.classes == ("caf\u00e9", "caf\\udce9")


def test_a_list_gives_labels_by_key(tmp_path: Path) -> None:
    STORAGE.write(str(tmp_path / "list.tsv"), "\ufeff# mine\nk5\twolf\r\nk0\t dog \n\nk2\tdog\n".encode())
    dataset = numbered(tmp_path / "data", [1] * 6)

    found = labelled_samples(dataset, STORAGE, str(tmp_path / "list.tsv"))

    assert (found.sample_ids.tolist(), found.labels.tolist()) == ([0, 2, 5], [0, 0, 1])
    assert (found.classes, found.unlabelled) == (("dog", "wolf"), 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"k0\tdog\nk9\tcat\n", "no sample has the key 'k9'"),
        (b"k0\tdog\nk0\tcat\n", "line 2 has another label for 'k0'"),
        (b"k0 dog\n", "line 1 has no key and label"),
        (b"k0\t\n", "line 1 has no key and label"),
        (b"\xff\xfe", "it is not UTF-8"),
        (b"", "must have labels"),
        (b"k0\tdog\nk1\tdog\n", "must have at least two classes"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, text: bytes, why: str) -> None:
    STORAGE.write(str(tmp_path / "list.tsv"), text)

    with pytest.raises(EvaluationError, match=why):
        labelled_samples(numbered(tmp_path / "data", [1, 2]), STORAGE, str(tmp_path / "list.tsv"))


@pytest.mark.parametrize(
    ("labels", "classes", "why"),
    [
        ([-1, -1, -1], (), "--data: must have labels"),
        ([], (), "--data: must have labels"),
        ([3, 3, -1], (), "--data: must have at least two classes, got \"only '3'\""),
        ([0, 0], ("ant", "bee"), "--data: must have at least two classes"),
        ([0, 2], ("ant", "bee"), "label: must be of one of the 2 classes"),
    ],
)
def test_a_dataset_without_classes_is_refused(
    tmp_path: Path, labels: list[int], classes: tuple[str, ...], why: str
) -> None:
    with pytest.raises(EvaluationError, match=why):
        labelled_samples(numbered(tmp_path, labels, classes), STORAGE)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    dataset = labelled_dataset(tmp_path, {"ant": 3, "bee": 3}, has_labels=False)

    with pytest.raises(EvaluationError, match=r"must have labels.*class folders with `convmae shard`"):
        labelled_samples(dataset, STORAGE)


@given(st.lists(st.integers(0, 4), min_size=12, max_size=80), st.floats(0.05, 0.9), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_each_class_is_divided_by_the_ratio_and_keeps_a_sample_to_learn_from(
    labels: list[int], ratio: float, seed: int
) -> None:
    whole = samples(labels, tuple("abcde"))
    try:
        train, test = divided(whole, ratio, seed)
    except EvaluationError:
        assert all(min(round(count * ratio), count - 1) == 0 for count in np.bincount(labels) if count)
        return

    assert sorted([*train.sample_ids, *test.sample_ids]) == list(range(len(labels)))
    for label in set(labels):
        count, tested = labels.count(label), test.labels.tolist().count(label)
        assert tested == min(round(count * ratio), count - 1)
    assert all(labels[sample] == label for sample, label in zip(test.sample_ids, test.labels, strict=True))
    again = divided(whole, ratio, seed)[1]
    assert again.sample_ids.tolist() == test.sample_ids.tolist()


def test_seeds_divide_differently_and_impossible_ratios_are_refused() -> None:
    whole = samples([0, 1] * 50, ("a", "b"))

    assert divided(whole, 0.2, 0)[1].sample_ids.tolist() != divided(whole, 0.2, 1)[1].sample_ids.tolist()
    for ratio in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(EvaluationError, match="--test-ratio: must be between 0 and 1"):
            divided(whole, ratio, 0)
    with pytest.raises(EvaluationError, match="must leave samples to test on"):
        divided(samples([0, 1], ("a", "b")), 0.2, 0)


def test_a_choice_of_samples_is_by_hash_and_holds_that_of_fewer() -> None:
    whole = samples([0, 1] * 50, ("a", "b"))

    few, more = (set(whole.at_most(count, 0).sample_ids.tolist()) for count in (10, 30))

    assert (len(few), len(more)) == (10, 30)
    assert few < more
    assert whole.at_most(100, 0) is whole
    assert few != set(whole.at_most(10, 1).sample_ids.tolist())


def test_labels_of_another_order_of_classes_are_matched_by_name() -> None:
    train = samples([0, 1, 2], ("ant", "bee", "cat"))

    found = matched(train, samples([0, 1, 2, 2], ("cat", "ant", "bee")))

    assert (found.classes, found.labels.tolist()) == (train.classes, [2, 0, 1, 1])
    numbers = matched(samples([0, 1, 2], ("1", "2", "7"), is_named=False), samples([1, 0], ("2", "7"), is_named=False))
    assert numbers.labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("train", "test", "why"),
    [
        (("ant", "bee"), ("ant", "cat"), "2 in train, 2 in test.*only train has bee"),
        (("ant", "bee", "cat"), ("ant", "bee"), "3 in train, 2 in test.*only train has cat"),
        (("ant", "bee"), ("ant", "bee", "cat"), "2 in train, 3 in test.*only test has cat"),
    ],
)
def test_other_classes_are_refused(train: tuple[str, ...], test: tuple[str, ...], why: str) -> None:
    with pytest.raises(EvaluationError, match=f"classes: must be the same in train and test.*{why}"):
        matched(samples([0, 1], train), samples([0, 1], test))


def test_names_and_numbers_are_other_classes_and_so_is_one_without_train_samples() -> None:
    with pytest.raises(EvaluationError, match="only test has 0, 1"):
        matched(samples([0, 1], ("ant", "bee")), samples([0, 1], ("0", "1"), is_named=False))
    with pytest.raises(EvaluationError, match="only test has cat"):
        matched(samples([0, 1], ("ant", "bee", "cat")), samples([0, 2], ("ant", "bee", "cat")))
    with pytest.raises(EvaluationError, match=r"only test has n0, n1, n10, n11, n12 and 15 more"):
        names = tuple(f"n{number}" for number in range(20))
        matched(samples([0, 1], ("a", "b")), samples(list(range(20)), names, is_named=False))
