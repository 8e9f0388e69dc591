"""The MAE recipe's augmentation as a pure function of (seed, epoch, sample id, image size).

Random resized crop and horizontal flip. No generator is advanced, so neither the batch nor the thread that an image
falls into can change its crop.

Source: He et al. 2022, arXiv:2111.06377, appendix A.1; parameters of torchvision's RandomResizedCrop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.image.decode import Pixels, resize
from pipeline.order import hashing

SCALE = (0.2, 1.0)
"""Range of the crop's share of the image's area."""
RATIO = (3 / 4, 4 / 3)
"""Range of the crop's width over height, uniform in its logarithm."""
ATTEMPTS = 10

Draws = npt.NDArray[np.float64]
CropRow = npt.NDArray[np.int32]
"""(5,): top, left, height and width in pixels, and 1 where mirrored."""

_STREAM = 0x41554747  # keeps augmentation apart from what else is keyed by (seed, epoch)


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def of(self, pixels: Pixels) -> Pixels:
        """The rectangle as a view of (H, W, C) pixels, not mirrored."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def crop_draws(seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> Draws:
    """Draws that decide the crops of some samples in one epoch, once their sizes are known.

    For many at once: NumPy's calls cost the same for one sample as for a batch.

    Args:
        seed: The run's.
        epoch: From 0.
        samples: (n,) ids in the dataset.

    Returns:
        (n, 41) numbers in [0, 1); a row depends on seed, epoch and its sample alone.
    """
    return hashing.uniforms(hashing.key(_STREAM, seed, epoch), samples, 4 * ATTEMPTS + 1)


def random_crop(draws: Draws, height: int, width: int, scale_range: tuple[float, float] = SCALE) -> Crop:
    """The crop and flip of one sample in one epoch.

    Args:
        draws: (41,); its row of crop_draws().
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        scale_range: Of the crop's share of the image's area.
    """
    least, most = scale_range
    *attempts, last = draws.tolist()
    flip = last < 0.5
    for attempt in range(ATTEMPTS):
        scale, ratio, down, right = attempts[4 * attempt : 4 * attempt + 4]
        area = height * width * (least + scale * (most - least))
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        aspect = math.exp(low + ratio * (high - low))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(down * (height - crop_height + 1)), int(right * (width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width, flip)
    return _widest(height, width, flip)


class Augmentation(Protocol):
    """What makes an image of a batch out of a decoded one, by draws that belong to its sample and epoch."""

    def draws(self, seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> Draws:
        """Draws of some samples in one epoch; a row depends on seed, epoch and its sample alone.

        Args:
            seed: The run's.
            epoch: From 0.
            samples: (n,) ids in the dataset.
        """

    @property
    def scaled_decode(self) -> bool:
        """Whether a JPEG is decoded at a fraction of its size where that still has more pixels than are wanted."""

    def crop(self, draws: Draws, height: int, width: int) -> Crop:
        """What to show of an image.

        Args:
            draws: The sample's row.
            height: Of the image, in pixels.
            width: Likewise.
        """

    def image(self, shown: Pixels, crop: Crop, draws: Draws, image_shape: tuple[int, int]) -> Pixels:
        """(C, H, W) of what is shown.

        Args:
            shown: (height, width, C) pixels of the crop, which may have been shrunk.
            crop: Where they were.
            draws: The sample's row.
            image_shape: H and W, in pixels.
        """


@dataclass(frozen=True)
class RandomCrops:
    """Random resized crops and flips: those of the MAE recipe, if nothing else is said."""

    scale: tuple[float, float] = SCALE
    """Range of the crop's share of the image's area."""
    scaled_decode: bool = False
    """As of `Augmentation`."""

    def draws(self, seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> Draws:
        """As `crop_draws`."""
        return crop_draws(seed, epoch, samples)

    def crop(self, draws: Draws, height: int, width: int) -> Crop:
        """As `Augmentation.crop`."""
        return random_crop(draws, height, width, self.scale)

    def image(self, shown: Pixels, crop: Crop, draws: Draws, image_shape: tuple[int, int]) -> Pixels:  # noqa: ARG002
        """As `Augmentation.image`."""
        return resized(shown, crop, image_shape)


def augmented(pixels: Pixels, crop: Crop, image_shape: tuple[int, int]) -> Pixels:
    """(C, H, W) of the crop.

    Args:
        pixels: (height, width, C).
        crop: What to show.
        image_shape: H and W of the result, in pixels.
    """
    return resized(crop.of(pixels), crop, image_shape)


def resized(shown: Pixels, crop: Crop, image_shape: tuple[int, int]) -> Pixels:
    """(C, H, W) of the pixels of a crop.

    Args:
        shown: (height, width, C).
        crop: Where they were.
        image_shape: H and W of the result, in pixels.
    """
    result = resize(shown, *image_shape)
    return _mirrored(result) if crop.flip else result


def _mirrored(pixels: Pixels) -> Pixels:
    """(C, H, W) with left and right exchanged: eight bytes at once where rows have that many: a fifth of the time."""
    if pixels.dtype != np.uint8 or pixels.shape[2] % 8 or not pixels.flags.c_contiguous:
        return pixels[:, :, ::-1]
    result = np.empty_like(pixels)
    result.view(">u8")[:] = pixels.view("<u8")[:, :, ::-1]
    return result


def center_crop(pixels: Pixels, image_shape: tuple[int, int]) -> Pixels:
    """(C, H, W) of the largest central part with the proportions of `image_shape`, for pictures and evaluation."""
    height, width = pixels.shape[:2]
    scale = min(height / image_shape[0], width / image_shape[1])
    rows, columns = (max(1, round(side * scale)) for side in image_shape)
    crop = Crop((height - rows) // 2, (width - columns) // 2, rows, columns, flip=False)
    return augmented(pixels, crop, image_shape)


def _widest(height: int, width: int, flip: bool) -> Crop:
    """The largest central crop within RATIO, for images too long for any draw."""
    aspect = min(max(width / height, RATIO[0]), RATIO[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    crop_width, crop_height = max(1, crop_width), max(1, crop_height)
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip)
