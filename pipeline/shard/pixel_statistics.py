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

from pipeline.image.channels import DEEP_BITS, PHOTOGRAPH_BITS, PixelKind

if TYPE_CHECKING:
    from pipeline.image.decode import Pixels

_UNIT = 1 << 40
"""An image's mean is a whole number of this part of 1; what is cut off is far below what is written down."""
_DIGITS = {8: 6, 16: 9}
"""That are written, by the bits of a value: values of 16 bits often use a small part of their range."""


@dataclass(frozen=True)
class PixelStatistics:
    """What pixels are like, as shares of the largest value, 0..1."""

    images: int
    """Of which they were measured."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bits: int = PHOTOGRAPH_BITS
    """Of a value."""

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def kind(self) -> PixelKind:
        """What the images were decoded to."""
        return PixelKind(self.channels, self.bits)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        deep = {} if self.bits == PHOTOGRAPH_BITS else {"bits": self.bits}
        return {"images": self.images, "mean": list(self.mean), "std": list(self.std), **deep}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PixelStatistics:
        """Read them.

        Raises:
            ValueError: A field is missing, unknown, of another type, or out of its range.
        """
        if not isinstance(fields, dict) or set(fields) - {"bits"} != {"images", "mean", "std"}:
            raise ValueError("pixels must have images, mean and std")
        bits = fields.get("bits", PHOTOGRAPH_BITS)
        if "bits" in fields and (type(bits) is not int or bits != DEEP_BITS):
            raise ValueError(f"pixels.bits must be {DEEP_BITS}, or left out for {PHOTOGRAPH_BITS}")
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
        return cls(images, tuple(map(float, mean)), tuple(map(float, std)), bits)


@dataclass(frozen=True)
class PixelSums:
    """Sums over some images of what statistics are made of."""

    images: int
    sums: tuple[int, ...]
    """Of the images' means, in parts of _UNIT."""
    squares: tuple[int, ...]
    """Of the means of squares."""
    bits: int = PHOTOGRAPH_BITS
    """Of a value."""

    @classmethod
    def none(cls, kind: PixelKind) -> PixelSums:
        """Of no image."""
        return cls(0, (0,) * kind.channels, (0,) * kind.channels, kind.bits)

    @classmethod
    def of(cls, pixels: Pixels) -> PixelSums:
        """Of one image, (H, W, C) of 8 or 16 bits."""
        bits = 8 * pixels.dtype.itemsize
        values = np.arange(1 << bits, dtype=np.int64)
        # A histogram: exact, and faster than squares of so many pixels.
        counts = [np.bincount(plane.ravel(), minlength=len(values)) for plane in np.moveaxis(pixels, -1, 0)]
        pixel_count, most = pixels.shape[0] * pixels.shape[1], len(values) - 1
        sums = tuple(int(count @ values) * _UNIT // (pixel_count * most) for count in counts)
        squares = tuple(int(count @ values**2) * _UNIT // (pixel_count * most**2) for count in counts)
        return cls(1, sums, squares, bits)

    def __add__(self, other: PixelSums) -> PixelSums:
        sums = tuple(one + two for one, two in zip(self.sums, other.sums, strict=True))
        squares = tuple(one + two for one, two in zip(self.squares, other.squares, strict=True))
        return PixelSums(self.images + other.images, sums, squares, self.bits)

    def statistics(self) -> PixelStatistics:
        """Of at least one image, to six digits; to nine of 16 bits. No deviation is less than one step of a value."""
        least, digits = 1 / ((1 << self.bits) - 1), _DIGITS[self.bits]
        means = [Fraction(total, self.images * _UNIT) for total in self.sums]
        of_squares = [Fraction(total, self.images * _UNIT) for total in self.squares]
        variances = [max(Fraction(0), square - mean**2) for square, mean in zip(of_squares, means, strict=True)]
        return PixelStatistics(
            self.images,
            tuple(round(float(mean), digits) for mean in means),
            tuple(round(max(math.sqrt(variance), least), digits) for variance in variances),
            self.bits,
        )


def spread_places(total: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ascending places of `count` samples out of `total`, equally far apart; all where `count` is 0 or not smaller."""
    count = min(count, total) or total
    return np.arange(count, dtype=np.int64) * total // count
