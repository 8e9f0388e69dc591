"""Labels of a fine-tuning: which samples it trains with, which it is measured on, and its classes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from jobs.errors import EvaluationError
from jobs.evaluate.labels import (
    InputNames,
    LabelledSamples,
    divided,
    fraction_of,
    labelled_samples,
    matched,
    refuse_overlap,
)
from jobs.recipe.recipe import Recipe
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage

_NAMES = InputNames(
    "data", "finetune.labels", "finetune.validation_ratio", "finetune.validation_data", "finetune.validation_labels"
)


@dataclass(frozen=True, eq=False)
class TrainingLabels:
    """The labelled samples of a fine-tuning."""

    train: LabelledSamples
    validation: LabelledSamples | None
    """None where accuracy is not measured. Its labels are places in the classes of `train`."""

    @classmethod
    def of(cls, storage: Storage, recipe: Recipe, dataset: Dataset | None = None) -> TrainingLabels:
        """Read labels, and choose as the recipe says.

        Args:
            storage: Reaches the data sets.
            recipe: Of a fine-tuning.
            dataset: That of the recipe, if it is open.

        Raises:
            EvaluationError: No labels, one class, classes that differ, or fewer labels than a batch has images.
            DatasetError: There is no data set, or it is damaged.
        """
        part = recipe.finetune
        assert part
        data = dataset or Dataset.open(storage, recipe.data, check_etags=recipe.check_etags)
        train, validation = labelled_samples(data, storage, part.labels, _NAMES), None
        if part.validation_ratio:
            train, validation = divided(train, part.validation_ratio, part.split_seed, _NAMES)
        if part.validation_data:
            other = Dataset.open(storage, part.validation_data, check_etags=recipe.check_etags)
            found = labelled_samples(other, storage, part.validation_labels, _NAMES.other)
            refuse_overlap(train, found, _NAMES.other_data)
            validation = matched(train, found)
        if part.label_fraction < 1:
            train = fraction_of(train, part.label_fraction, part.split_seed)
        if len(train) < recipe.global_batch_size:
            rule = f"must have at least global_batch_size = {recipe.global_batch_size} labelled samples to train with"
            remedy = "lower global_batch_size (and lanes), or give more labels"
            raise EvaluationError("data", rule, f"{len(train)}", remedy)
        return cls(train, validation)

    @property
    def sha256(self) -> str:
        """Of classes, ids and labels that are trained with."""
        found = hashlib.sha256(json.dumps(self.train.classes).encode())
        for column in (self.train.sample_ids, self.train.labels):
            found.update(np.ascontiguousarray(column, "<i8").tobytes())
        return found.hexdigest()

    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe with what it trains with; a fine-tuning that began with something else is refused.

        Raises:
            EvaluationError: Classes or labels are not those of the recipe.
        """
        part = recipe.finetune
        assert part
        for field, given, found in (
            ("finetune.classes", list(part.classes), list(self.train.classes)),
            ("finetune.samples_sha256", part.samples_sha256, self.sha256),
        ):
            if given and given != found:
                remedy = "restore the labels that the run began with, or start a new run"
                raise EvaluationError(field, "must be what the run began with", f"{found}"[:80], remedy)
        return recipe.amended({"finetune.classes": list(self.train.classes), "finetune.samples_sha256": self.sha256})
