"""How far a share of samples may be from that of all such samples."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054
"""Of the standard normal distribution: 95 % lie within."""


def wilson_interval(correct: int, samples: int, z: float = Z_95) -> tuple[float, float]:
    """The score interval of a share, which also holds near 0 and 1 and for few samples.

    Args:
        correct: From 0 to `samples`.
        samples: At least 1.
        z: Quantile of the standard normal distribution.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953; recommended by Brown, Cai and DasGupta 2001,
    doi:10.1214/ss/1009213286.
    """
    share, wide = correct / samples, z * z / samples
    middle = (share + wide / 2) / (1 + wide)
    half = z * math.sqrt(share * (1 - share) / samples + wide / (4 * samples)) / (1 + wide)
    # The ends are exact there, and rounding would put them a little beside.
    return (middle - half if correct else 0.0), (middle + half if correct < samples else 1.0)
