"""How much a recipe trains with, as plans and estimates count it."""

from __future__ import annotations

import numpy as np

from jobs.finetune.training_labels import TrainingLabels
from jobs.recipe.cost import IMAGENET_CLASSES
from jobs.recipe.plan import DatasetSize
from jobs.recipe.recipe import Recipe
from pipeline.store.storage import Storage


def trained_size(storage: Storage, recipe: Recipe) -> DatasetSize:
    """The recipe's data set, or of a fine-tuning the samples of it that are chosen by their labels.

    Where a recipe names no data set, ImageNet-1k's training set is assumed.

    Raises:
        DatasetError: There is no data set, or it is damaged.
        EvaluationError: It cannot be trained with: as `TrainingLabels.of`.
    """
    size, part = DatasetSize.of(storage, recipe), recipe.finetune
    if part is None:
        return size
    if not recipe.data:
        return size.only(np.rint(size.shard_samples * part.trained_ratio).astype(np.int64), IMAGENET_CLASSES)
    if part.validation_data:
        storage.check(part.validation_data, write=False)
    train = TrainingLabels.of(storage, recipe).train
    shards = np.searchsorted(np.cumsum(size.shard_samples), train.sample_ids, side="right")
    return size.only(np.bincount(shards, minlength=len(size.shard_samples)), len(train.classes))
