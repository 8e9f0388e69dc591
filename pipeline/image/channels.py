"""Numbers of channels to which images are decoded; apart from the decoders, for those who only name them."""

from __future__ import annotations

GRAY_CHANNELS = 1
RGB_CHANNELS = 3
CHANNELS = (GRAY_CHANNELS, RGB_CHANNELS)
"""All there are."""
