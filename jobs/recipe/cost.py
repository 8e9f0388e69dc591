"""What a recipe computes and what it trains: the pretraining of a model, or its fine-tuning as a classifier."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.recipe.recipe import Recipe
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
    def of(cls, recipe: Recipe, classes: int = 0) -> RecipeCost:
        """Count without building the model.

        Args:
            recipe: Of either kind.
            classes: Of a fine-tuning that has not begun, if they are known.
        """
        model, part = recipe.model, recipe.finetune
        images = recipe.grain if recipe.is_exact else recipe.images_at_once
        if part is None:
            cost, counts = flops(model, images), parameters(model)
        else:
            outputs = len(part.classes) or classes or IMAGENET_CLASSES
            cost = classifier_flops(model, images, outputs, part.kind)
            counts = classifier_parameters(model, outputs, part.kind)
        return cls(cost.forward.total / images, cost.training / images, counts)
