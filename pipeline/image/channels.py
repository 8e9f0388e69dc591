"""What images are decoded to, channels and bits; apart from the decoders, for those who only name it."""

from __future__ import annotations

from dataclasses import dataclass

GRAY_CHANNELS = 1
RGB_CHANNELS = 3
PHOTOGRAPH_BITS = 8
DEEP_BITS = 16
MOST_CHANNELS = 64
"""As many as a model may have."""


@dataclass(frozen=True)
class PixelKind:
    """What the images of a data set are decoded to."""

    channels: int
    bits: int = PHOTOGRAPH_BITS
    """Of a value, 8 or 16; values are unsigned integers."""

    @property
    def is_photographic(self) -> bool:
        """Whether images are decoded to gray or RGB of 8 bits, whatever their files hold.

        Others are decoded to the bands that their files have, each with all its bits.
        """
        return self.bits == PHOTOGRAPH_BITS and self.channels in (GRAY_CHANNELS, RGB_CHANNELS)


RGB_PIXELS = PixelKind(RGB_CHANNELS)
