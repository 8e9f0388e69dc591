from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from labelled_data import STORAGE, labelled_dataset

from jobs.errors import EvaluationError
from jobs.finetune.training_labels import TrainingLabels
from jobs.finetune.training_size import trained_size
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from pipeline.load.chosen_samples import ChosenSamples
from pipeline.load.dataset import Dataset

SMALL = {"global_batch_size": 2, "lanes": 1, "max_workers": 1, "finetune.validation_ratio": 0.25}


def recipe(data: str, **changes: object) -> Recipe:
    return named_recipe("tiny_finetune").amended({"data": data, **SMALL, **changes})


def test_labels_are_divided_and_a_share_of_each_class_is_trained_with(tmp_path: Path) -> None:
    data = labelled_dataset(tmp_path, {"cat": 8, "dog": 4}).url

    whole = TrainingLabels.of(STORAGE, recipe(data))
    half = TrainingLabels.of(STORAGE, recipe(data, **{"finetune.label_fraction": 0.5}))

    assert whole.validation and half.validation
    assert np.bincount(whole.train.labels).tolist() == [6, 3]
    assert np.bincount(whole.validation.labels).tolist() == [2, 1]
    assert np.bincount(half.train.labels).tolist() == [3, 2]
    assert set(half.train.sample_ids.tolist()) < set(whole.train.sample_ids.tolist())
    assert half.validation.sample_ids.tolist() == whole.validation.sample_ids.tolist()
    assert whole.pinned(recipe(data)).finetune.classes == ("cat", "dog")  # type: ignore[union-attr]


def test_what_cannot_be_trained_with_is_refused(tmp_path: Path) -> None:
    data = labelled_dataset(tmp_path / "a", {"cat": 6, "dog": 6}).url
    other = labelled_dataset(tmp_path / "b", {"cat": 3, "fox": 3}).url
    bare = labelled_dataset(tmp_path / "c", {"cat": 3, "dog": 3}, has_labels=False).url
    single = labelled_dataset(tmp_path / "d", {"cat": 6}).url
    whole = {"finetune.validation_ratio": 0.0}
    (tmp_path / "odd.txt").write_text("nobody\tant\n")
    lists = {"finetune.labels": f"{tmp_path}/odd.txt"}
    none = {"finetune.validation_data": data, "finetune.validation_labels": f"{tmp_path}/none.txt"}

    for given, message in (
        (recipe(bare, **whole), "^data: must have labels.*with finetune.labels$"),
        (recipe(data, **lists), "^finetune.labels: must be a list of keys"),
        (recipe(data, **whole, **none), "^finetune.validation_labels: must exist"),
        (
            recipe(data, **{"finetune.validation_ratio": 0.01}),
            "^data: .*a larger finetune.validation_ratio, or a second",
        ),
        (recipe(single, **whole), "at least two classes"),
        (recipe(data, **whole, **{"finetune.validation_data": other}), "must be the same in train and test"),
        (recipe(data, **whole, **{"finetune.validation_data": data}), "must not hold what is tested on"),
        (recipe(data, global_batch_size=20), "at least global_batch_size = 20 labelled samples"),
    ):
        with pytest.raises(EvaluationError, match=message) as caught:
            TrainingLabels.of(STORAGE, given)
        assert "--" not in str(caught.value), "options are those of another command"


def test_a_run_that_began_with_other_labels_is_refused(tmp_path: Path) -> None:
    data = labelled_dataset(tmp_path, {"cat": 8, "dog": 4}).url
    began = TrainingLabels.of(STORAGE, recipe(data)).pinned(recipe(data))

    later = TrainingLabels.of(STORAGE, recipe(data, **{"finetune.split_seed": 1}))

    with pytest.raises(EvaluationError, match="samples_sha256: must be what the run began with"):
        later.pinned(began)


def test_chosen_samples_are_those_of_the_whole_dataset_by_their_places(tmp_path: Path) -> None:
    dataset = labelled_dataset(tmp_path, {"cat": 8, "dog": 4})
    ids = np.array([1, 4, 5, 11])

    chosen = ChosenSamples(Dataset.open(STORAGE, dataset.url), ids)

    assert chosen.samples == 4
    assert [(sample.id, sample.key) for sample in chosen.read([3, 0])] == [
        (3, dataset.read([11])[0].key),
        (0, dataset.read([1])[0].key),
    ]


def test_plans_count_the_samples_that_are_trained_with(tmp_path: Path) -> None:
    data = labelled_dataset(tmp_path / "data", {"cat": 12, "dog": 20}, samples_per_shard=10).url
    half = {"finetune.label_fraction": 0.5}

    size = trained_size(STORAGE, recipe(data, **half))

    # A quarter of each class is measured on; half of what is left is trained with, 4.5 cats rounded to even.
    assert (size.samples, size.classes, size.shard_samples.sum()) == (4 + 8, 2, 12)
    chosen = TrainingLabels.of(STORAGE, recipe(data, **half)).train.sample_ids
    assert size.shard_samples.tolist() == [count for count in np.bincount(chosen // 10).tolist() if count]
    assert "12 of 32 samples are trained with" in size.origin
    assert trained_size(STORAGE, named_recipe("tiny").amended({"data": data})).samples == 32
    assumed = trained_size(STORAGE, recipe("", **half))
    assert assumed.samples == pytest.approx(1_281_167 * 0.75 * 0.5, rel=0.01) and assumed.classes == 1000
