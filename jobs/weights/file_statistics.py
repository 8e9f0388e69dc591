"""What the images were normalised by with which the weights in a file were trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jobs.errors import WeightsFileError
from jobs.recipe.image_statistics import (
    BITS_KEY,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MEAN_KEY,
    STD_KEY,
    band_statistics,
    statistics_metadata,
)
from jobs.weights.torch_file import is_safetensors
from jobs.weights.weight_files import opened_file
from model import ChannelStatistics, ConvMAEConfig
from pipeline.errors import clipped
from pipeline.image.channels import DEEP_BITS, PHOTOGRAPH_BITS, RGB_CHANNELS
from pipeline.store.json_text import parsed_json

IMAGENET = ChannelStatistics(IMAGENET_MEAN, IMAGENET_STD)


def image_statistics(metadata: Mapping[str, str], url: str) -> ChannelStatistics:
    """What the images were normalised by with which weights were trained; ImageNet's where a file does not say.

    Raises:
        WeightsFileError: It is damaged.
    """
    given = {**statistics_metadata((), ()), **metadata}
    try:
        mean, std = _numbers(given[MEAN_KEY]), _numbers(given[STD_KEY])
        if not mean or len(mean) != len(std) or not all(std):
            raise ValueError("no mean and deviation of each channel")
    except ValueError as error:
        rule = f"must say what its images were normalised by ({clipped(str(error))})"
        raise WeightsFileError("weights", rule, url, "get the file again from where it was written") from None
    return ChannelStatistics(mean, std)


def statistics_for(config: ConvMAEConfig, statistics: ChannelStatistics) -> ChannelStatistics:
    """What to normalise by when a model takes weights that were trained with these; see `model.weights.to_bands`."""
    bands = config.in_channels
    is_adapted = bands != RGB_CHANNELS == len(statistics.mean)
    return ChannelStatistics(*band_statistics(*statistics, bands)) if is_adapted else statistics


def image_bits(metadata: Mapping[str, str]) -> int:
    """Of a value of the images with which weights were trained; 8 where a file does not say."""
    return DEEP_BITS if metadata.get(BITS_KEY) == str(DEEP_BITS) else PHOTOGRAPH_BITS


def metadata_in(path: Path, url: str) -> dict[str, str]:
    """What a local file of weights says of itself: nothing if it is no safetensors file, as of the official code.

    Raises:
        WeightsFileError: It is damaged.
    """
    if not is_safetensors(path, url):
        return {}
    with opened_file(path, url) as file:
        return dict(file.metadata() or {})


def statistics_in(path: Path, url: str, config: ConvMAEConfig) -> ChannelStatistics:
    """What a model that takes the weights in a local file, of any kind, is to normalise by.

    Args:
        path: Of the file.
        url: Where it comes from.
        config: Of the model.

    Raises:
        WeightsFileError: It is damaged.
    """
    return statistics_for(config, image_statistics(metadata_in(path, url), url))


def _numbers(text: str) -> tuple[float, ...]:
    values = parsed_json(text)
    if not isinstance(values, list) or not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
        raise ValueError("no list of numbers from 0 to 1")
    return tuple(map(float, values))
