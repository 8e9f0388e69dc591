"""What a recipe computes and what it trains: the pretraining of a model, or its fine-tuning as a classifier."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.recipe.recipe import Recipe
from jobs.recipe.resolution import Resolution
from model.cost import Parameters, classifier_flops, classifier_parameters, flops, parameters

IMAGENET_CLASSES = 1000
"""Assumed where a fine-tuning's classes are not known yet."""


@dataclass(frozen=True)
class RecipeCost:
    """Of the model that a recipe trains."""

    forward_flops: float
    """Of one image, with all its views; what is computed once for a grain or micro-batch is shared by its images."""
    training_flops: float
    """With the backward pass."""
    parameters: Parameters

    @classmethod
    def of(cls, recipe: Recipe, classes: int = 0, resolution: Resolution | None = None) -> RecipeCost:
        """Count without building the model.

        Args:
            recipe: Of either kind.
            classes: Of a fine-tuning that has not begun, if they are known.
            resolution: One of the recipe's sizes of images; None: that of its model.
        """
        model, part = resolution.model if resolution else recipe.model, recipe.finetune
        images = recipe.grain if recipe.is_exact else recipe.images_at_once
        if part is None:
            cost, counts = flops(model, images), parameters(recipe.model)
        else:
            outputs = len(part.classes) or classes or IMAGENET_CLASSES
            cost = classifier_flops(model, images, outputs, part.kind)
            counts = classifier_parameters(model, outputs, part.kind)
        return cls(cost.forward.total / images, cost.training / images, counts)


@dataclass(frozen=True)
class SizedSteps:
    """Steps of a run with images of one size."""

    resolution: Resolution
    steps: range
    """From 0."""
    cost: RecipeCost


def steps_by_size(recipe: Recipe, steps_per_epoch: int, total_steps: int, classes: int = 0) -> list[SizedSteps]:
    """A run's steps by the size of their images, in order; one where there is no schedule.

    Args:
        recipe: Of either kind.
        steps_per_epoch: Global batches in an epoch.
        total_steps: That the run makes; those of its epochs, or fewer.
        classes: As of `RecipeCost.of`.
    """
    found = []
    for each in recipe.resolutions:
        first, stop = (min(total_steps, epoch * steps_per_epoch) for epoch in (each.first_epoch, each.stop_epoch))
        if stop > first:
            found.append(SizedSteps(each, range(first, stop), RecipeCost.of(recipe, classes, each)))
    return found
