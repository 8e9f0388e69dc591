"""What images are normalised by, where neither recipe, data set nor weights say it: ImageNet's mean and deviation.

Every run before data sets were measured was trained with them, and so were the official weights. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.image.channels import PHOTOGRAPH_BITS

if TYPE_CHECKING:
    from pipeline.shard.manifest import Manifest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of each channel, RGB in 0..1; torchvision's and the official code's."""
IMAGENET_STD = (0.229, 0.224, 0.225)
MEAN_KEY, STD_KEY, BITS_KEY = "image_mean", "image_std", "image_bits"
"""Names of fields of a recipe, and of the metadata of files of weights, where the first two are JSON lists."""


def recorded_statistics(manifest: Manifest) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of a data set's pixels, as its manifest has them; ImageNet's where it was never measured."""
    pixels = manifest.pixels
    return (pixels.mean, pixels.std) if pixels else (IMAGENET_MEAN, IMAGENET_STD)


def band_statistics(
    mean: Sequence[float], std: Sequence[float], bands: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For weights that were trained with these, made into weights for other bands: the means, for each band."""
    return (round(sum(mean) / len(mean), 6),) * bands, (round(sum(std) / len(std), 6),) * bands


def statistics_metadata(mean: Sequence[float], std: Sequence[float], bits: int = PHOTOGRAPH_BITS) -> dict[str, str]:
    """What the metadata of a file say of them; of empty ones ImageNet's. Nothing of 8 bits, as before there were 16."""
    deep = {} if bits == PHOTOGRAPH_BITS else {BITS_KEY: str(bits)}
    given = {MEAN_KEY: mean or IMAGENET_MEAN, STD_KEY: std or IMAGENET_STD}
    return {key: json.dumps(list(values)) for key, values in given.items()} | deep
