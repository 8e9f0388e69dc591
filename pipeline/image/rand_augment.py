"""RandAugment as a pure function of (seed, epoch, sample id): some of PIL's operations on each image, in a row.

Which there are, and what a magnitude means to each, is timm's `rand-m9-mstd0.5-inc1`, with which the official
fine-tuning trains; the operations themselves are PIL's.

Source: Cubuk et al. 2020, arXiv:1909.13719; timm/data/auto_augment.py of github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from pipeline.image.augment import Crop, Draws, RandomCrops
from pipeline.image.decode import Pixels
from pipeline.order import hashing

MOST = 10.0
"""Magnitude at which an operation does most."""
DEVIATION = 0.5
"""Of the normal distribution that magnitudes are drawn from."""
APPLIED = 0.5
"""Probability that an operation which was drawn is applied."""
FILL = (124, 116, 104)
"""What comes into view from outside of an image: ImageNet's mean."""
GRAY_FILL = 117
"""Its brightness, for gray images."""
_DRAWS = 4
"""Of one operation: which, whether, how much, in which direction."""
_STREAM = 0x52616E64

_Apply = Callable[[Image.Image, float, float], Image.Image]
"""Given an image, the magnitude over MOST, and 1 or -1."""


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=_fill(image)
    )


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    return GRAY_FILL if image.mode == "L" else FILL


def _solarized_sum(image: Image.Image, level: float, _: float) -> Image.Image:
    added = min(128, int(level * 110))
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> _Apply:
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + 0.9 * level * sign))


OPERATIONS: dict[str, _Apply] = {
    "autocontrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(
        30 * level * sign, resample=Image.Resampling.BICUBIC, fillcolor=_fill(image)
    ),
    "posterize": lambda image, level, _: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    "solarize": lambda image, level, _: ImageOps.solarize(image, 256 - min(256, int(256 * level))),
    "solarize_add": _solarized_sum,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: _affine(image, 1, 0.3 * level * sign, 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: _affine(image, 1, 0, 0, 0.3 * level * sign, 1, 0),
    "translate_x": lambda image, level, sign: _affine(image, 1, 0, 0.45 * level * sign * image.width, 0, 1, 0),
    "translate_y": lambda image, level, sign: _affine(image, 1, 0, 0, 0, 1, 0.45 * level * sign * image.height),
}
"""By name; with each, a higher magnitude changes more."""


@dataclass(frozen=True)
class Operation:
    """One operation on one image."""

    name: str
    magnitude: float
    """In [0, MOST]."""
    sign: float
    """1 or -1: to which side, where there are two."""

    def applied(self, image: Image.Image) -> Image.Image:
        """The image that it makes of another."""
        return OPERATIONS[self.name](image, self.magnitude / MOST, self.sign)


@dataclass(frozen=True)
class RandAugmented:
    """Random crops on which RandAugment works."""

    crops: RandomCrops
    operations: int = 2
    """On each image."""
    magnitude: float = 9.0
    """The mean of what is drawn, of MOST."""

    def draws(self, seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> Draws:
        """Those of the crop, then those of the operations; arguments as of `RandomCrops.draws`."""
        own = hashing.uniforms(hashing.key(_STREAM, seed, epoch), samples, self._own_draws)
        return np.concatenate([self.crops.draws(seed, epoch, samples), own], axis=1)

    @property
    def _own_draws(self) -> int:
        return _DRAWS * self.operations

    @property
    def scaled_decode(self) -> bool:
        """As of `RandomCrops`."""
        return self.crops.scaled_decode

    def crop(self, draws: Draws, height: int, width: int) -> Crop:
        """As of `RandomCrops`."""
        return self.crops.crop(draws[: -self._own_draws or None], height, width)

    def image(self, shown: Pixels, crop: Crop, draws: Draws, image_shape: tuple[int, int]) -> Pixels:
        """(C, H, W) of what is shown; arguments as of `RandomCrops.image`."""
        cropped = self.crops.image(shown, crop, draws, image_shape)
        image = Image.fromarray(np.ascontiguousarray(cropped[0] if len(cropped) == 1 else cropped.transpose(1, 2, 0)))
        for operation in self.chosen(draws[len(draws) - self._own_draws :]):
            image = operation.applied(image)
        changed = np.asarray(image)
        return changed[None] if changed.ndim == 2 else changed.transpose(2, 0, 1)

    def chosen(self, draws: Draws) -> list[Operation]:
        """The operations on one image.

        Args:
            draws: (4 * operations,) of the image.
        """
        found, names = [], list(OPERATIONS)
        for which, whether, how_much, side in draws.reshape(-1, _DRAWS).tolist():
            if whether < APPLIED:
                drawn = NormalDist(self.magnitude, DEVIATION).inv_cdf(max(how_much, 2.0**-53))
                magnitude = min(max(drawn, 0.0), MOST)
                found.append(Operation(names[int(which * len(names))], magnitude, 1.0 if side < 0.5 else -1.0))
        return found
