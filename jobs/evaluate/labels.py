"""Labels of a dataset's samples, from its indexes or from a list, and their division into train and test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.errors import EvaluationError
from pipeline.errors import clipped
from pipeline.load.dataset import INDEX_THREADS, Dataset
from pipeline.order import hashing
from pipeline.shard.index import NO_LABEL, ShardIndex
from pipeline.store.storage import Storage

TEST_RATIO = 0.2
"""Of a dataset that is divided: what is tested on."""
_CHOICE_STREAM = 0x50524F42  # separates what is chosen here from other uses of a seed and a sample id

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class InputNames:
    """What a user calls a labelled dataset and what belongs to it: options of a command, or fields of a recipe."""

    data: str = "--data"
    labels: str = "--labels"
    """The list of its labels."""
    test_ratio: str = "--test-ratio"
    """The share of it that is tested on; empty: that cannot be chosen."""
    other_data: str = "--train-data"
    """Another dataset, beside which it is not divided; empty: there is none."""
    other_labels: str = "--train-labels"

    @property
    def other(self) -> InputNames:
        """Of the other dataset."""
        return InputNames(self.other_data, self.other_labels, test_ratio="", other_data="")


OPTIONS = InputNames()
"""Of `convmae evaluate`."""


@dataclass(frozen=True, eq=False)
class LabelledSamples:
    """Samples of one dataset whose class is known."""

    url: str
    dataset_digest: str
    classes: tuple[str, ...]
    """Names: those of the manifest, those of a list, or else the numbers as text."""
    sample_ids: Int64s
    """(n,) ascending."""
    labels: Int64s
    """(n,) places in `classes`."""
    unlabelled: int
    """Samples of the dataset that are left out, since they have no label."""
    is_named: bool = True
    """Whether `classes` may hold names that no sample has."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def digest(self) -> str:
        """SHA-256 of what they are: the dataset, the samples, and the name of the class of each."""
        known = f"{self.dataset_digest} {self.classes}".encode()
        return hashlib.sha256(known + self.sample_ids.tobytes() + self.labels.tobytes()).hexdigest()

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the classes that have samples."""
        return tuple(self.classes[label] for label in np.unique(self.labels).tolist())

    def only(self, places: npt.NDArray[np.bool_]) -> LabelledSamples:
        """Some of the samples.

        Args:
            places: (n,) True for those.
        """
        return replace(self, sample_ids=self.sample_ids[places], labels=self.labels[places])

    def at_most(self, samples: int, seed: int) -> LabelledSamples:
        """As many samples, chosen by a hash of their ids; all where there are no more."""
        if len(self) <= samples:
            return self
        chosen = np.argsort(_draws(self.sample_ids, seed), kind="stable")[:samples]
        places = np.zeros(len(self), bool)
        places[chosen] = True
        return self.only(places)

    def named_as(self, classes: tuple[str, ...]) -> LabelledSamples:
        """The same samples, their labels as places in other `classes`, which have all names of those present."""
        places = {name: place for place, name in enumerate(classes)}
        table = np.array([places.get(name, NO_LABEL) for name in self.classes], np.int64)
        return replace(self, classes=classes, labels=table[self.labels])


def labelled_samples(
    dataset: Dataset, storage: Storage, list_url: str = "", names: InputNames = OPTIONS
) -> LabelledSamples:
    """The samples of a dataset that have a label.

    Args:
        dataset: Its indexes are read whole.
        storage: Reaches the list.
        list_url: Of a text file with a key, a tab and a label in each line; empty: the labels of the dataset.
        names: What both are called in messages.

    Raises:
        EvaluationError: None has a label, all have the same one, or the list does not fit the dataset.
        DatasetError: An index is missing or damaged.
    """
    found = _listed(dataset, storage, list_url, names.labels) if list_url else _own(dataset)
    if not len(found):
        remedy = f"make it from class folders with `convmae shard`, or give a list of labels with {names.labels}"
        raise EvaluationError(names.data, "must have labels", dataset.url, remedy)
    if len(found.present) < 2:
        remedy = "give a dataset of several classes: with one, every prediction is right"
        raise EvaluationError(
            names.data, "must have at least two classes", f"only {clipped(found.present[0])!r}", remedy
        )
    return found


def divided(
    samples: LabelledSamples, ratio: float, seed: int, names: InputNames = OPTIONS
) -> tuple[LabelledSamples, LabelledSamples]:
    """Train and test: of each class, the share `ratio` whose ids have the lowest hashes is tested on.

    At least one sample of each class stays in train, since a class that was never seen cannot be predicted.

    Args:
        samples: Of one dataset.
        ratio: In (0, 1).
        seed: Another one gives another division.
        names: What dataset and ratio are called in messages.

    Raises:
        EvaluationError: The ratio is not in (0, 1), or nothing is left to test on.
    """
    if not 0 < ratio < 1:
        raise EvaluationError(names.test_ratio, "must be between 0 and 1", ratio, "use 0.2")
    tested = _of_each_class(samples, seed, lambda counts: np.minimum(np.rint(counts * ratio), counts - 1))
    if not tested.any():
        ways = [f"a larger {names.test_ratio}"] if names.test_ratio else []
        ways += [f"a second dataset with {names.other_data}"] if names.other_data else []
        remedy = ", or ".join(["give more samples", *ways])
        raise EvaluationError(names.data, "must leave samples to test on", f"{len(samples)} samples", remedy)
    return samples.only(~tested), samples.only(tested)


def fraction_of(samples: LabelledSamples, fraction: float, seed: int) -> LabelledSamples:
    """Of each class, the share of samples whose ids have the lowest hashes; at least one.

    A smaller fraction is a part of a larger one.

    Args:
        samples: Of one dataset.
        fraction: In (0, 1].
        seed: Another one gives another choice.
    """
    return samples.only(_of_each_class(samples, seed, lambda counts: np.maximum(np.rint(counts * fraction), 1)))


def _of_each_class(
    samples: LabelledSamples, seed: int, wanted: Callable[[Int64s], npt.NDArray[Any]]
) -> npt.NDArray[np.bool_]:
    """(n,) which samples are chosen: of each class as many as `wanted` makes of its count, by the lowest hashes."""
    order = np.lexsort((samples.sample_ids, _draws(samples.sample_ids, seed), samples.labels))
    _, starts, counts = np.unique(samples.labels[order], return_index=True, return_counts=True)
    place_in_class = np.arange(len(samples)) - np.repeat(starts, counts)
    chosen = np.zeros(len(samples), bool)
    chosen[order] = place_in_class < np.repeat(wanted(counts), counts)
    return chosen


def refuse_overlap(train: LabelledSamples, test: LabelledSamples, field: str) -> None:
    """Refuse samples of one dataset that are in both.

    Args:
        train: Samples to learn from.
        test: Samples to test on.
        field: What is to be left out, for the message.

    Raises:
        EvaluationError: There are some.
    """
    if train.dataset_digest != test.dataset_digest:
        return
    if shared := len(np.intersect1d(train.sample_ids, test.sample_ids)):
        remedy = f"{shared} samples are in both; leave it out, and have one data set divided"
        raise EvaluationError(field, "must not hold what is tested on", train.url, remedy)


def matched(train: LabelledSamples, test: LabelledSamples) -> LabelledSamples:
    """The test samples with labels as those of train.

    Raises:
        EvaluationError: The datasets do not have the same classes; names those of one alone.
    """
    theirs, ours = (set(samples.classes if samples.is_named else samples.present) for samples in (train, test))
    alone = [("train", theirs - ours)] if train.is_named and test.is_named else []
    alone += [("test", ours - theirs), ("test", set(test.present) - set(train.present))]
    for side, names in alone:
        if names:
            some = ", ".join(clipped(name, 40) for name in sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            remedy = f"only {side} has {some}{more}; give datasets of the same classes"
            counts = f"{len(theirs)} in train, {len(ours)} in test"
            raise EvaluationError("classes", "must be the same in train and test", counts, remedy)
    return test.named_as(train.classes)


def _draws(sample_ids: Int64s, seed: int) -> npt.NDArray[np.float64]:
    return hashing.uniforms(hashing.key(_CHOICE_STREAM, seed), sample_ids, 1)[:, 0]


def _own(dataset: Dataset) -> LabelledSamples:
    labels = np.concatenate([np.empty(0, np.int64), *(index.table["label"] for index in indexes(dataset))])
    ids = np.flatnonzero(labels != NO_LABEL)
    found, classes = labels[ids], class_names(dataset)
    if classes:
        if len(found) and found.max() >= len(classes):
            rule = f"must be of one of the {len(classes)} classes of the manifest"
            raise EvaluationError("label", rule, int(found.max()), "index the dataset again")
    else:
        numbers, found = np.unique(found, return_inverse=True)
        classes = tuple(map(str, numbers.tolist()))
    is_named = bool(dataset.manifest.classes)
    return LabelledSamples(dataset.url, dataset.digest, classes, ids, found, len(labels) - len(ids), is_named)


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """Those of the manifest; folders may have names that are no UTF-8, and files of others need some."""
    return tuple(name.encode("utf-8", "backslashreplace").decode() for name in dataset.manifest.classes)


def indexes(dataset: Dataset) -> Iterator[ShardIndex]:
    """The indexes of all shards, in order; several are read at once."""
    shards = len(dataset.manifest.shards)
    with ThreadPoolExecutor(min(INDEX_THREADS, max(1, shards)), "convmae-index") as threads:
        for start in range(0, shards, INDEX_THREADS):  # so that no more than these are held
            yield from threads.map(dataset.index, range(start, min(start + INDEX_THREADS, shards)))


def _listed(dataset: Dataset, storage: Storage, url: str, field: str) -> LabelledSamples:
    wanted = _read_list(storage, url, field)
    classes = tuple(sorted(set(wanted.values())))
    numbers = {name: number for number, name in enumerate(classes)}
    ids, labels, seen, first = [], [], set[bytes](), 0
    for index in indexes(dataset):
        for place, key in enumerate(index.table["key"].tolist()):
            if key in wanted:
                if key in seen:
                    why = f"the key {clipped(_text(key))!r} is of several samples"
                    raise _odd_list(field, url, why, "use distinct keys")
                seen.add(key)
                ids.append(first + place)
                labels.append(numbers[wanted[key]])
        first += len(index)
    if missing := next((key for key in wanted if key not in seen), None):
        remedy = "`convmae order` shows keys; each line is a key, a tab and a label"
        raise _odd_list(field, url, f"no sample has the key {clipped(_text(missing))!r}", remedy)
    places = np.array(ids, np.int64), np.array(labels, np.int64)
    return LabelledSamples(dataset.url, dataset.digest, classes, *places, first - len(ids))


def _read_list(storage: Storage, url: str, field: str) -> dict[bytes, str]:
    try:
        # As in lists of images, lines end at a line feed alone: names may hold what Python also splits at.
        lines = storage.read(url).decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise EvaluationError(field, "must exist", url, "give a text file: key, tab, label") from None
    except UnicodeDecodeError:
        raise _odd_list(field, url, "it is not UTF-8", "save it as UTF-8") from None
    wanted: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        key, _, label = line.partition("\t")
        label = label.strip()
        if not (key and label):
            remedy = "write key, tab and label in each line"
            raise _odd_list(field, url, f"line {number} has no key and label", remedy)
        if wanted.setdefault(key.encode(), label) != label:
            why = f"line {number} has another label for {clipped(key)!r}"
            raise _odd_list(field, url, why, "give each key once")
    return wanted


def _odd_list(field: str, url: str, why: str, remedy: str) -> EvaluationError:
    return EvaluationError(field, f"must be a list of keys and labels of the dataset ({why})", url, remedy)


def _text(key: bytes) -> str:
    return key.decode("utf-8", "replace")
