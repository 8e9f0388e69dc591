"""ConvMAE in pure PyTorch: masking, sparse encoder, decoder, loss, weights. No I/O, no process group.

PyTorch is imported with the first name that needs it: a recipe has a `ConvMAEConfig`, and commands that only read what
a run recorded would wait a second for PyTorch, and hold 150 MB of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.channel_statistics import ChannelStatistics
from model.config import ConvMAEConfig
from model.errors import ModelConfigError, WeightsError

if TYPE_CHECKING:
    from model.backbone import Backbone
    from model.classifier import Classifier
    from model.convmae import ConvMAE, Output
    from model.dense import Features
    from model.noise import mask_noise
    from model.pixels import denormalise, normalise
    from model.pooled import PooledEncoder

__all__ = [
    "Backbone",
    "ChannelStatistics",
    "Classifier",
    "ConvMAE",
    "ConvMAEConfig",
    "Features",
    "ModelConfigError",
    "Output",
    "PooledEncoder",
    "WeightsError",
    "denormalise",
    "mask_noise",
    "normalise",
]

_MODULES = {
    "Backbone": "backbone",
    "Classifier": "classifier",
    "ConvMAE": "convmae",
    "Features": "dense",
    "Output": "convmae",
    "PooledEncoder": "pooled",
    "denormalise": "pixels",
    "mask_noise": "noise",
    "normalise": "pixels",
}
"""Where the names are that need PyTorch."""


def __getattr__(name: str) -> Any:
    """The name, imported when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
