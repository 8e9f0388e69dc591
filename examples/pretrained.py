"""The backbone of both examples, pretrained where a file is given, and what its images are normalised by."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from jobs.recipe.image_statistics import MEAN_KEY, STD_KEY, statistics_metadata
from model import Backbone, ChannelStatistics, ConvMAEConfig, ModelConfigError
from pipeline.errors import UserError


class PretrainedError(UserError):
    """A file of weights that has no encoder for a backbone in it."""


REMEDY = "give a file of `convmae export --format backbone` or `convmae consolidate`"


def backbone(weights: Path | None, drop_path: float) -> Backbone:
    """The encoder with stochastic depth, as fine-tuning wants it.

    Args:
        weights: A file of `convmae export --format backbone` or `convmae consolidate`; where None, the encoder is the
            `tiny` one with random weights.
        drop_path: Of the last block.

    Raises:
        PretrainedError: If the file is missing or damaged, or of a model without maps or another kind altogether.
    """
    if weights is None:
        return Backbone(ConvMAEConfig.preset("tiny"), drop_path=drop_path)
    try:
        with safe_open(weights, "pt") as file:
            config = json.loads((file.metadata() or {})["model"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError) as error:
        raise PretrainedError("--weights", f"must be a safetensors file ({error})", str(weights), REMEDY) from None
    except (KeyError, ValueError):
        rule = "must say of which model it is, in its metadata"
        raise PretrainedError("--weights", rule, str(weights), REMEDY) from None
    try:
        made = Backbone(ConvMAEConfig(**config), drop_path=drop_path)
        made.load(state)
    except (TypeError, ModelConfigError) as error:
        rule = f"must hold a ConvMAE encoder with convolution stages ({error})"
        raise PretrainedError("--weights", rule, str(weights), REMEDY) from None
    return made


def statistics(weights: Path | None) -> ChannelStatistics:
    """What images are normalised by for these weights; ImageNet's, where they do not say or are random.

    Raises:
        PretrainedError: If the file is damaged.
    """
    metadata = statistics_metadata((), ())
    try:
        if weights is not None:
            with safe_open(weights, "pt") as file:
                metadata |= file.metadata() or {}
        mean, std = (tuple(map(float, json.loads(metadata[key]))) for key in (MEAN_KEY, STD_KEY))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        rule = f"must say what images are normalised by ({error})"
        raise PretrainedError("--weights", rule, str(weights), REMEDY) from None
    return ChannelStatistics(mean, std)
