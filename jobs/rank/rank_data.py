"""What a rank trains on: the samples of a pretraining, or the labelled ones of a fine-tuning, and their order."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.checkpoint.rank_group import RankGroup
from jobs.finetune.training_labels import TrainingLabels
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import order_of
from pipeline.load.block_cache import CachePlace
from pipeline.load.chosen_samples import ChosenSamples
from pipeline.load.dataset import Dataset
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage


@dataclass(frozen=True, eq=False)
class RankData:
    """The data of one rank."""

    dataset: Dataset
    order: Order
    labels: TrainingLabels | None
    """Of a fine-tuning: by the ids that the dataset's samples have here."""

    @classmethod
    def open(cls, storage: Storage, recipe: Recipe, group: RankGroup) -> RankData:
        """Open it as the recipe says. Collective for a fine-tuning: rank 0 reads the labels.

        Raises:
            UserError: There is no such data set, or its labels are not those that the run began with.
        """
        cache = CachePlace(recipe.cache_dir, recipe.cache_bytes) if recipe.cache_dir else None
        dataset = Dataset.open(storage, recipe.data, cache=cache, check_etags=recipe.check_etags)
        if recipe.finetune is None:
            return cls(dataset, order_of(recipe, dataset.samples), None)

        def read() -> TrainingLabels | None:
            if group.rank:
                return None
            labels = TrainingLabels.of(storage, recipe, dataset)
            labels.pinned(recipe)
            return labels

        labels = group.broadcast(group.together(read))
        assert labels
        chosen = ChosenSamples(dataset, labels.train.sample_ids)
        return cls(chosen, order_of(recipe, chosen.samples), labels)
