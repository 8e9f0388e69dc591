"""The image size that an encoder is used with, as written on a command line."""

from __future__ import annotations

import dataclasses
import re

from model import ConvMAEConfig, ModelConfigError
from pipeline.errors import UserError, clipped


def image_shape(text: str, config: ConvMAEConfig) -> tuple[int, int]:
    """Height and width.

    Args:
        text: `512` or `512x768`; empty: that of the pretraining.
        config: Of the model, whose position embeddings are interpolated to the size.

    Raises:
        UserError: It has none of these forms, or there is no such grid of patches.
    """
    if not text:
        return config.image_shape
    match = re.fullmatch(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?", text)
    shape = (int(match[1]), int(match[2] or match[1])) if match else (1, 1)
    try:
        return dataclasses.replace(config, image_size=shape, mask_ratio=0.0, views=1).image_shape
    except ModelConfigError:
        rule = "must be a side or HEIGHTxWIDTH, multiples of 16 up to 16384, to which positions can be interpolated"
        raise UserError("--image-size", rule, clipped(text), "write 512, or 512x768") from None
