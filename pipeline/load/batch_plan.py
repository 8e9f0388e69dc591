"""All that decides which batches a rank gets and what is in them, but the bytes of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.image.augment import Augmentation, Draws
from pipeline.image.channels import PHOTOGRAPH_BITS, PixelKind
from pipeline.load.dataset import Dataset
from pipeline.load.image_maker import BadSamplePolicy, ImageMaker
from pipeline.order.sample_order import Order

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Of one rank. Picklable; the same in every process that makes a part of its batches."""

    order: Order
    lanes: range
    """Of the rank."""
    kind: PixelKind
    """To what images are decoded; C are its channels."""
    image_shapes: Mapping[int, tuple[int, int]]
    """H and W of the images from each epoch on where they change, by the epoch, from 0."""
    seed: int
    policy: BadSamplePolicy
    augmentation: Augmentation
    whole_windows: bool
    """Whether whole blocks of windows are read ahead, or single samples."""

    @property
    def batch_size(self) -> int:
        """n, images of one batch."""
        return len(self.lanes) * self.order.lane_batch_size

    @property
    def dtype(self) -> np.dtype[np.uint8 | np.uint16]:
        """Of the pixels."""
        return np.dtype(np.uint8 if self.kind.bits == PHOTOGRAPH_BITS else np.uint16)

    @property
    def largest_image_bytes(self) -> int:
        """Of the pixels of one image, in whichever epoch it has the most."""
        return (
            self.kind.channels
            * self.dtype.itemsize
            * max(height * width for height, width in self.image_shapes.values())
        )

    def shape(self, step: int) -> tuple[int, int, int]:
        """C, H and W of the images of a batch."""
        epoch = self.order.epoch(step)
        return (self.kind.channels, *self.image_shapes[max(first for first in self.image_shapes if first <= epoch)])

    def sample_ids(self, step: int) -> Int64s:
        """(n,) ids of the samples of a batch, lane after lane."""
        return np.concatenate([self.order.lane_batch(step, lane) for lane in self.lanes])

    def draws(self, step: int, sample_ids: Int64s) -> Draws:
        """What decides the crops of some samples in the epoch of a step."""
        return self.augmentation.draws(self.seed, self.order.epoch(step), sample_ids)

    def image_maker(self, dataset: Dataset, refused: Mapping[int, str]) -> ImageMaker:
        """What makes the images.

        Args:
            dataset: Where substitutes are read.
            refused: Samples that are not to be decoded, and why.
        """
        return ImageMaker(
            dataset,
            self.order,
            kind=self.kind,
            seed=self.seed,
            policy=self.policy,
            augmentation=self.augmentation,
            refused=refused,
        )
