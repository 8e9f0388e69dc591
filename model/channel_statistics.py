"""What the pixels of a data set are like. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class ChannelStatistics(NamedTuple):
    """Of pixels in 0..1, each channel for itself."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Deviation, above 0."""
