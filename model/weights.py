"""Names of weights: our module tree and the flat names of the official implementation (github.com/Alpha-VL/ConvMAE).

Ours are ``encoder.<name>`` and ``decoder.<name>``; the official ones are ``<name>``. No name occurs in both parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.config import PATCH_PIXELS
from model.errors import WeightsError


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under official names."""
    return {name.split(".", 1)[1]: tensor for name, tensor in state.items()}


def from_official(official: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names.

    Args:
        official: Weights by official name.
        ours: The state dict of the model that shall take them.

    Raises:
        WeightsError: If a name is missing or unexpected or a shape differs; its value lists all of them.
    """
    expected = to_official(ours)
    check_names(official, expected)
    return {name: official[short] for name, short in zip(ours, expected, strict=True)}


_EMBEDDINGS = ("patch_embed1.proj.weight", "patch_embed.proj.weight")
"""Official names, of ConvMAE and MAE: (dim, channels, side, side)."""
_PREDICTION = ("decoder_pred.weight", "decoder_pred.bias")
"""(P, dim) and (P,), the channels of a pixel beside each other."""


def to_bands(state: Mapping[str, Tensor], bands: int, channels: int = 3) -> dict[str, Tensor]:
    """Weights of a model for RGB images, as one for images of other bands, gray ones among them.

    Each band's embedding gets an equal part of the sum over the channels: of an image whose bands are alike it then
    computes what the other one does of that image in every channel, normalised alike. Each band's prediction gets the
    mean over the channels of a pixel. No band takes after one colour, since nobody knows which is which.

    Args:
        state: By our names or the official ones.
        bands: Of the images that the model is to take.
        channels: Of the images that it took; weights of another number are left as they are.
    """
    made = dict(state)
    for name, tensor in state.items():
        if name.endswith(_EMBEDDINGS) and tensor.ndim == 4 and tensor.shape[1] == channels:
            made[name] = (tensor.sum(1, keepdim=True) / bands).repeat(1, bands, 1, 1)
        elif name.endswith(_PREDICTION) and tensor.shape[0] == PATCH_PIXELS**2 * channels:
            mean = tensor.reshape(PATCH_PIXELS**2, channels, *tensor.shape[1:]).mean(1)
            made[name] = mean.repeat_interleave(bands, dim=0)
    return made


def check_names(given: Mapping[str, Any], expected: Mapping[str, Tensor], ignored: tuple[str, ...] = ()) -> None:
    """Compare a state dict with the one that it shall replace.

    Args:
        given: Weights by name.
        expected: Those of the model.
        ignored: Prefixes of names that may be given beyond those.

    Raises:
        WeightsError: If a name is missing or unexpected or a shape differs; its value lists all of them.
    """
    faults = [f"missing {name}" for name in expected if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in expected and not name.startswith(ignored)]
    faults += [
        f"{name} has shape {tuple(given[name].shape)} where the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if not faults:
        return
    remedy = "use the configuration, with the image size, that the weights were made with"
    if isinstance(given.get("model"), Mapping):
        remedy = 'this is a whole training checkpoint: give its "model"'
    raise WeightsError("state_dict", "must have the names and shapes of this model", faults, remedy)
