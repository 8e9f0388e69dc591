"""Fine-tuning: the classes of whole images, augmented and mixed as functions of (seed, epoch, sample).

Letters: B images, K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.evaluate.labels import Int64s
from jobs.finetune.erasing import erased
from jobs.finetune.mixing import Mixing, mixed, smoothed
from jobs.recipe.recipe import Recipe
from model.classifier import Classifier
from model.convmae import Output
from model.noise import DROP_PATH_STREAM, sample_noise
from model.pixels import normalise
from pipeline.load.batch import Batch

NORM_MOMENTUM = 0.1
"""Of the running statistics of a linear head's batch norm, as PyTorch has it."""
_STATISTICS_SCALE = 2.0**30
"""Statistics travel as multiples of its inverse, so that their sums do not depend on the order."""


class Classification:
    """The cross-entropy of soft targets.

    Images that mixup and CutMix mix with each other are neighbours in the batch, `Recipe.mixed_images` at a time, which
    are always on one rank. A linear head's batch norm has the statistics of one grain, as one GPU's batch has them in
    the official code; its running statistics are the means over the grains of the global batch.
    """

    def __init__(self, recipe: Recipe, labels: Int64s, model: Classifier, device: torch.device) -> None:
        """Name what targets follow from.

        Args:
            recipe: Of a fine-tuning.
            labels: (n,) of all samples, by the ids that batches have.
            model: That is trained; of a linear head the batch norm is kept.
            device: Of the rank.
        """
        assert recipe.finetune
        self._recipe, self._part, self._device = recipe, recipe.finetune, device
        self._labels, self._mixing = torch.from_numpy(labels), Mixing(self._part.mixup, self._part.cutmix)
        self._draws = model.noise_draws if self._part.drop_path else 0
        self._norm = batch_norm(model)
        self.words = 0 if self._norm is None else 2 * self._norm.num_features
        self._statistics: list[Tensor] = []

    def output(self, model: nn.Module, batch: Batch, chosen: slice) -> Output:
        """The mean loss of some images; what stands for a mask are the branches that are dropped."""
        images, targets = self._augmented(batch, chosen)
        noise = self._noise(batch, chosen)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
            logits = model(images, noise) if self._norm is None else self._probed(model, images)
        loss = -(targets * functional.log_softmax(logits.float(), dim=-1)).sum(-1).mean()
        dropped = images.new_zeros(len(images), 1) if noise is None else (noise < self._part.drop_path).float()
        return Output(loss, dropped)

    def write(self, words: Tensor) -> None:
        """Of a batch norm: the means, over grains, of its means and variances."""
        for statistics in self._statistics:
            words += statistics
        self._statistics = []

    def update(self, words: Sequence[float]) -> None:
        """Advance the running statistics of a batch norm."""
        if self._norm is None:
            return
        assert self._norm.running_mean is not None and self._norm.running_var is not None
        assert self._norm.num_batches_tracked is not None
        now = torch.tensor(words, dtype=torch.float64, device="cpu").to(self._norm.running_mean)
        for running, value in zip((self._norm.running_mean, self._norm.running_var), now.chunk(2), strict=True):
            running.mul_(1 - NORM_MOMENTUM)
            running.add_(value * NORM_MOMENTUM)
        self._norm.num_batches_tracked += 1

    def _augmented(self, batch: Batch, chosen: slice) -> tuple[Tensor, Tensor]:
        if not self._part.mixes:
            return self._erased(batch, chosen)
        size = self._recipe.mixed_images
        first, end = chosen.start // size * size, -(-chosen.stop // size) * size
        groups = [self._mixed(batch, slice(start, start + size)) for start in range(first, end, size)]
        images, targets = (torch.cat(parts) for parts in zip(*groups, strict=True))
        inner = slice(chosen.start - first, chosen.stop - first)
        return images[inner], targets[inner]

    def _mixed(self, batch: Batch, group: slice) -> tuple[Tensor, Tensor]:
        images, targets = self._erased(batch, group)
        named = int(batch.sample_ids[group.start])
        mix = self._mixing.drawn(self._recipe.seed, batch.epoch, named, self._recipe.model.image_shape)
        return mixed(images, targets, mix)

    def _erased(self, batch: Batch, chosen: slice) -> tuple[Tensor, Tensor]:
        ids, part = batch.sample_ids[chosen], self._part
        images = normalise(batch.images[chosen], self._recipe.statistics)
        if part.erasing:
            images = erased(images, self._recipe.seed, batch.epoch, ids, part.erasing)
        shown = {item.bad.id: item.substitute for item in batch.substitutions}
        labels = self._labels[torch.tensor([shown.get(sample, sample) for sample in ids.tolist()], device="cpu")]
        return images, smoothed(labels.to(self._device), len(part.classes), part.label_smoothing)

    def _noise(self, batch: Batch, chosen: slice) -> Tensor | None:
        if not self._draws:
            return None
        ids, recipe = batch.sample_ids[chosen], self._recipe
        return sample_noise(recipe.seed, batch.epoch, ids, self._draws, self._device, stream=DROP_PATH_STREAM)

    def _probed(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits of a linear head in training, whose batch norm is that of these images."""
        assert isinstance(model, Classifier) and isinstance(model.head, nn.Sequential) and self._norm is not None
        with torch.no_grad():
            features = model.features(images).float()
        share = len(images) / self._recipe.global_batch_size
        moments = torch.cat([features.mean(0), features.var(0)]).double() * share
        self._statistics.append((moments * _STATISTICS_SCALE).round_() / _STATISTICS_SCALE)
        logits: Tensor = model.head[1](functional.batch_norm(features, None, None, training=True, eps=self._norm.eps))
        return logits


def batch_norm(model: Classifier) -> nn.BatchNorm1d | None:
    """That of a linear head."""
    first = model.head[0] if isinstance(model.head, nn.Sequential) else None
    return first if isinstance(first, nn.BatchNorm1d) else None
