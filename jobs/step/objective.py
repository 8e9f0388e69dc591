"""What a run trains its model for: the loss of some images of a batch, and what it needs beside gradients.

One object of a rank. A step (jobs.step.training_step) asks it for the loss of one grain or micro-batch after the other;
what it computes of an image depends on seed, epoch, sample and the grain's other images alone, so that trajectories are
the same at any world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from jobs.recipe.recipe import Recipe
from jobs.recipe.resolution import resolution_at
from model.convmae import Output
from model.noise import mask_noise
from model.pixels import normalise
from pipeline.load.batch import Batch


class Objective(Protocol):
    """A loss, and statistics that the ranks add up with it."""

    words: int
    """Numbers that the ranks add up beside the loss; sums of them must not depend on their order."""

    def output(self, model: nn.Module, batch: Batch, chosen: slice) -> Output:
        """The loss of one grain or micro-batch; the mean over its images.

        Args:
            model: The rank's, or the engine that wraps it.
            batch: This rank's part of the global batch.
            chosen: The images of the grain or micro-batch.
        """

    def write(self, words: Tensor) -> None:
        """Write (words,) float64, which are 0, on the device: of the grains since the last step."""

    def update(self, words: Sequence[float]) -> None:
        """Take what all ranks' words add up to, when the weights were updated."""


class Reconstruction:
    """Pretraining: masked pixels are predicted from visible patches."""

    words = 0

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        """Name what masks follow from.

        Args:
            recipe: Of a pretraining.
            device: Of the rank.
        """
        self._recipe, self._device = recipe, device
        self._resolutions = recipe.resolutions

    def output(self, model: nn.Module, batch: Batch, chosen: slice) -> Output:
        """The error of the predicted pixels, and the masks."""
        device, recipe = self._device, self._recipe
        sample_ids = batch.sample_ids[chosen].to(device, non_blocking=True)
        draws = resolution_at(self._resolutions, batch.epoch).model.mask_patches
        noise = mask_noise(recipe.seed, batch.epoch, sample_ids, draws, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            output: Output = model(normalise(batch.images[chosen], recipe.statistics), noise=noise)
        return output

    def write(self, words: Tensor) -> None:
        """There are none."""

    def update(self, words: Sequence[float]) -> None:
        """Nothing is kept."""
