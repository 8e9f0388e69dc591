"""Mean and deviation of the pixels of a data set, each channel for itself, in sums whose order does not matter.

Every image counts the same, whatever its size, as a model sees all of them at one size. Sums are integers: the same
images give the same statistics, however they were dealt to tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pipeline.image.decode import Pixels

_LEVELS = 256
_UNIT = 1 << 40
"""An image's mean is a whole number of this part of 1; what is cut off is far below what is written down."""
_DIGITS = 6
LEAST_STD = 1 / 255
"""One step of an image of 8 bits, so that what is divided by it stays finite where all pixels are alike."""


@dataclass(frozen=True)
class PixelStatistics:
    """What pixels are like, as shares of the largest value, 0..1."""

    images: int
    """Of which they were measured."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {"images": self.images, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PixelStatistics:
        """Read them.

        Raises:
            ValueError: A field is missing, unknown, of another type, or out of its range.
        """
        if not isinstance(fields, dict) or set(fields) != {"images", "mean", "std"}:
            raise ValueError("pixels must have images, mean and std")
        images, mean, std = fields["images"], fields["mean"], fields["std"]
        if type(images) is not int or images < 1:
            raise ValueError("pixels.images must be an integer of at least 1")
        for name, values in (("mean", mean), ("std", std)):
            if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
                raise ValueError(f"pixels.{name} must be a list of numbers")
        if not mean or len(mean) != len(std):
            raise ValueError("pixels.mean and pixels.std must have a number for each channel")
        if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
            raise ValueError("pixels.mean must be from 0 to 1, and pixels.std above 0 up to 1")
        return cls(images, tuple(map(float, mean)), tuple(map(float, std)))


@dataclass(frozen=True)
class PixelSums:
    """Sums over some images of what statistics are made of."""

    images: int
    sums: tuple[int, ...]
    """Of the images' means, in parts of _UNIT."""
    squares: tuple[int, ...]
    """Of the means of squares."""

    @classmethod
    def none(cls, channels: int) -> PixelSums:
        """Of no image."""
        return cls(0, (0,) * channels, (0,) * channels)

    @classmethod
    def of(cls, pixels: Pixels) -> PixelSums:
        """Of one image, (H, W, C) of 8 bits."""
        values = np.arange(_LEVELS, dtype=np.int64)
        # A histogram: exact, and faster than squares of so many pixels.
        counts = [np.bincount(plane.ravel(), minlength=_LEVELS) for plane in np.moveaxis(pixels, -1, 0)]
        pixel_count, most = pixels.shape[0] * pixels.shape[1], _LEVELS - 1
        sums = tuple(int(count @ values) * _UNIT // (pixel_count * most) for count in counts)
        squares = tuple(int(count @ values**2) * _UNIT // (pixel_count * most**2) for count in counts)
        return cls(1, sums, squares)

    def __add__(self, other: PixelSums) -> PixelSums:
        sums = tuple(one + two for one, two in zip(self.sums, other.sums, strict=True))
        squares = tuple(one + two for one, two in zip(self.squares, other.squares, strict=True))
        return PixelSums(self.images + other.images, sums, squares)

    def statistics(self) -> PixelStatistics:
        """Of at least one image, to six digits."""
        means = [Fraction(total, self.images * _UNIT) for total in self.sums]
        of_squares = [Fraction(total, self.images * _UNIT) for total in self.squares]
        variances = [max(Fraction(0), square - mean**2) for square, mean in zip(of_squares, means, strict=True)]
        return PixelStatistics(
            self.images,
            tuple(round(float(mean), _DIGITS) for mean in means),
            tuple(round(max(math.sqrt(variance), LEAST_STD), _DIGITS) for variance in variances),
        )


def spread_places(total: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ascending places of `count` samples out of `total`, equally far apart; all where `count` is 0 or not smaller."""
    count = min(count, total) or total
    return np.arange(count, dtype=np.int64) * total // count
