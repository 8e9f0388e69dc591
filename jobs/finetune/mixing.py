"""Mixup and CutMix: the images and targets of a group are mixed with those of the same group in reverse.

A group is what one rank computes at once, whatever the world size: then what an image is mixed with is, too, a function
of (seed, epoch, sample).

Sources: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; as timm's Mixup does in its mode
`batch`, with which the official fine-tuning trains.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.order import hashing

_STREAM = 0x4D697875


@dataclass(frozen=True)
class Mix:
    """How a group is mixed."""

    share: float
    """Of an image's own pixels and target in the result."""
    box: tuple[int, int, int, int] | None
    """Top, bottom, left and right of what the other image covers, in pixels; None: both shine through everywhere."""


@dataclass(frozen=True)
class Mixing:
    """From what a group's mix is drawn."""

    mixup: float
    """Both parameters of the Beta distribution of mixup's shares; 0: no mixup."""
    cutmix: float
    """The same of CutMix's; 0: no CutMix. With both, each group has one of them, by a fair draw."""

    def drawn(self, seed: int, epoch: int, first_sample_id: int, image_shape: tuple[int, int]) -> Mix:
        """The mix of one group.

        Args:
            seed: The run's.
            epoch: From 0.
            first_sample_id: Of the group; it names the group in its epoch.
            image_shape: Height and width, in pixels.
        """
        # Python keeps this generator's stream across versions; a Beta distribution takes an unknown number of draws.
        generator = random.Random(hashing.key(_STREAM, seed, epoch, first_sample_id))
        cuts = self.cutmix > 0 and (self.mixup == 0 or generator.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        if alpha == 0:
            return Mix(1.0, None)
        share = generator.betavariate(alpha, alpha)
        return _cut(share, generator, image_shape) if cuts else Mix(share, None)


def _cut(share: float, generator: random.Random, image_shape: tuple[int, int]) -> Mix:
    """A box of about that share of the image around a random centre; what the border cuts off counts to the share."""
    sides = []
    for side in image_shape:
        length, center = int(side * math.sqrt(1 - share)), generator.randrange(side)
        sides += [max(0, center - length // 2), min(side, center + length // 2)]
    top, bottom, left, right = sides
    covered = (bottom - top) * (right - left) / (image_shape[0] * image_shape[1])
    return Mix(1 - covered, (top, bottom, left, right))


def mixed(images: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """A group's images and targets, mixed.

    Args:
        images: (B, 3, H, W) normalised.
        targets: (B, classes).
        mix: How.
    """
    others = images.flip(0)
    if mix.box is None:
        images = images * mix.share + others * (1 - mix.share)
    else:
        top, bottom, left, right = mix.box
        images = images.clone()
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images, targets * mix.share + targets.flip(0) * (1 - mix.share)


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets of some labels: (B,) -> (B, classes) float32, each row with a sum of 1.

    Args:
        labels: Places in the classes.
        classes: How many there are.
        smoothing: The share of a target that is spread over all classes, its own among them.
    """
    targets = torch.nn.functional.one_hot(labels, classes).to(torch.float32)
    return targets * (1 - smoothing) + smoothing / classes
