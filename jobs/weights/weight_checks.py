"""Checks of weights against a model: names, shapes, types, numbers of heads, and values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.errors import WeightsFileError
from jobs.weights.weight_files import model_config, opened_file, shapes_of
from model import ConvMAE, ConvMAEConfig
from model.errors import ModelConfigError, listed
from model.weights import check_names
from pipeline.errors import clipped

_NOT_IN_SHAPES = ("num_heads", "decoder_num_heads")
"""Fields of a model that its tensors do not show."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that weights may have, by safetensors' names; what training computes with can be made of them."""


def check_against(
    tensors: Mapping[str, Any], config: ConvMAEConfig, value: str, *, absent: Collection[str] = ()
) -> None:
    """Compare names and shapes with those of a model, without making it.

    Args:
        tensors: Anything with a shape, by name.
        config: Of the model.
        value: Where the tensors come from, for the message.
        absent: Names of the model that need not be there.

    Raises:
        WeightsFileError: A name is missing or unexpected, or a shape differs; names them.
    """
    with torch.device("meta"):
        expected = ConvMAE(config).state_dict()
    try:
        check_names(tensors, {name: value for name, value in expected.items() if name not in absent})
    except ModelConfigError as error:
        assert isinstance(error.value, list)
        rule = f"must be those of the model ({listed(error.value)})"
        raise WeightsFileError("weights", rule, value, error.remedy) from None


def check_dtypes(dtypes: Mapping[str, object], value: str) -> None:
    """Compare types by name, torch's or those of safetensors, with those that weights may have.

    Raises:
        WeightsFileError: One is not a floating-point type of 16 bits or more, so its values are not weights.
    """
    for name, dtype in dtypes.items():
        if dtype not in _FLOATS and dtype not in _FLOATS.values():
            rule = f"must be of float16, bfloat16, float32 or float64 ({clipped(name)} is of {dtype})"
            remedy = "give weights as they were trained, neither quantized nor converted"
            raise WeightsFileError("weights", rule, value, remedy)


def check_finite(tensors: Iterable[tuple[str, Tensor]], value: str) -> None:
    """Look for values from which no training can start.

    Raises:
        WeightsFileError: One is infinite or not a number, possibly only in fp32; names the first tensor.
    """
    for name, tensor in tensors:
        if not tensor.float().isfinite().all():
            rule = f"must be finite in fp32 ({clipped(name)} is not)"
            raise WeightsFileError("weights", rule, value, "use an earlier checkpoint, from before the loss diverged")


def check_header(path: Path, url: str, config: ConvMAEConfig) -> None:
    """Compare names, shapes, types and numbers of heads in a local file with a model; reads no tensor.

    Raises:
        WeightsFileError: They are those of another model; names them.
    """
    with opened_file(path, url) as file:
        theirs = model_config(dict(file.metadata() or {}), url)
        check_against(shapes_of(file), config, url)
        check_dtypes({name: file.get_slice(name).get_dtype() for name in file.keys()}, url)  # noqa: SIM118
    check_heads(theirs, config, url)


def check_heads(theirs: ConvMAEConfig, config: ConvMAEConfig, url: str) -> None:
    """Compare what shapes do not show of two models.

    Raises:
        WeightsFileError: A number of heads differs; names it.
    """
    for name in _NOT_IN_SHAPES:
        if getattr(theirs, name) != getattr(config, name):
            rule = f"must be of a model with {name} = {getattr(config, name)}, not {getattr(theirs, name)}"
            raise WeightsFileError("weights", rule, url, f"set model.{name}={getattr(theirs, name)}")


def check_values(path: Path, url: str) -> None:
    """Read a local file, one tensor at a time, for values from which no training can start; call after
    `check_header`.

    Raises:
        WeightsFileError: As `check_finite`.
    """
    with opened_file(path, url) as file:
        check_finite(((name, file.get_tensor(name)) for name in file.keys()), url)  # noqa: SIM118
