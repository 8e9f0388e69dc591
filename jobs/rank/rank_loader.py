"""The loader of one rank, as a recipe has it."""

from __future__ import annotations

from jobs.recipe.recipe import Recipe
from jobs.step.training_step import RankPlace
from pipeline.image.augment import Augmentation, RandomCrops
from pipeline.image.rand_augment import RandAugmented
from pipeline.load.dataset import Dataset
from pipeline.load.image_maker import BadSamplePolicy
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order


def rank_loader(dataset: Dataset, order: Order, recipe: Recipe, place: RankPlace) -> Loader:
    """The batches of one rank, read as the recipe says."""
    return Loader(
        dataset,
        order,
        image_shape={each.first_epoch: each.model.image_shape for each in recipe.resolutions},
        channels=recipe.model.in_channels,
        seed=recipe.seed,
        rank=place.rank,
        world_size=place.world_size,
        threads=recipe.loader_threads,
        in_processes=recipe.loader_processes,
        device=place.device,
        policy=BadSamplePolicy(recipe.on_bad_sample, recipe.max_consecutive_bad_samples),
        stall_seconds=recipe.stall_seconds,
        augmentation=_augmentation_of(recipe),
    )


def _augmentation_of(recipe: Recipe) -> Augmentation:
    """What makes an image of a batch out of a photograph."""
    part = recipe.finetune
    if part is None:
        return RandomCrops(scaled_decode=recipe.scaled_decode)
    crops = RandomCrops((part.least_crop, 1.0), recipe.scaled_decode)
    if not part.randaugment_operations:
        return crops
    return RandAugmented(crops, part.randaugment_operations, part.randaugment_magnitude)
