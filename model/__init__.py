"""ConvMAE in pure PyTorch: masking, sparse encoder, decoder, loss, weights. No I/O, no process group."""

from model.backbone import Backbone
from model.classifier import Classifier
from model.config import ConvMAEConfig
from model.convmae import ConvMAE, Output
from model.dense import Features
from model.errors import ModelConfigError, WeightsError
from model.noise import mask_noise
from model.pixels import ChannelStatistics, denormalise, normalise
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
