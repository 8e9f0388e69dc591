"""The pretrained encoder for detection, segmentation and classification: whole images in, a pyramid of maps out.

backbone = Backbone(ConvMAEConfig.preset("base"), drop_path=0.1)
backbone.load(safetensors.torch.load_file("step-00500400.safetensors"))
stage1, stage2, stage3 = backbone(images)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.nn import functional

from model import dense
from model.config import PARTS, PATCH_PIXELS, ConvMAEConfig, check_choice
from model.dense import Features
from model.encoder import Encoder
from model.errors import ModelConfigError
from model.vit import ViTEncoder
from model.weights import check_names

_NOT_OF_THE_MAPS = (
    *("decoder_", "mask_token", "stage1_output_decode.", "stage2_output_decode.", "norm."),
    *("fc_norm.", "head."),
)
"""Prefixes of official names of what follows the maps: in pretraining, and in a fine-tuned classifier."""


class Backbone(nn.Module):
    """The encoder without mask, fusion and final norm.

    Args:
        config: That of the pretraining, with its image size: position embeddings are interpolated from there.
        drop_path: Probability of dropping the last block's branches (stochastic depth); grows linearly from 0 at the
            first block, as in the official fine-tuning.
        recompute: Of ``stage1``, ``stage2``, ``stage3``, those whose blocks keep only their inputs for the backward
            pass: large images need less memory, and about a third more time.

    Raises:
        ModelConfigError: If drop_path is not in [0, 1), recompute names no stage, or the model has no feature maps.
    """

    def __init__(self, config: ConvMAEConfig, drop_path: float = 0.0, recompute: Collection[str] = ()) -> None:
        super().__init__()
        config.require_convolutions()
        for stage in recompute:
            check_choice("recompute", stage, PARTS[:3])
        self.config = config
        self.encoder = plain_encoder(config, recompute)
        set_drop_path(self.encoder, drop_path)

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of the three maps."""
        return self.config.embed_dim

    def forward(self, images: Tensor) -> Features:
        """Maps at strides 4, 8 and 16; ``.pooled`` of the result is one at stride 32.

        Args:
            images: (B, in_channels, H, W) float, normalised, of any size. Sides that are no multiple of 16 are padded
                with zeros at the bottom and right, and the maps are of the filled size.

        Raises:
            ModelConfigError: If the shape is another one, or the images were not normalised.
        """
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            rule = f"must have shape (batch, {self.config.in_channels}, height, width)"
            raise ModelConfigError(
                "images", rule, tuple(images.shape), "add a batch dimension, use images of as many channels"
            )
        if not images.is_floating_point():
            raise ModelConfigError("images", "must be normalised floats", images.dtype, "pass them through normalise()")
        height, width = images.shape[2:]
        filled = functional.pad(images, (0, -width % PATCH_PIXELS, 0, -height % PATCH_PIXELS))
        assert isinstance(self.encoder, Encoder)
        return dense.features(self.encoder, filled)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a pretrained model.

        Args:
            state: A consolidated checkpoint's tensors, ``ConvMAE(...).state_dict()``, or an official state dict, also
                of a fine-tuned classifier. What belongs to the decoder or to a head is ignored.

        Raises:
            WeightsError: If a name of the encoder is missing, a name is unknown or a shape differs; lists all of them.
        """
        load_encoder(self.encoder, state)


def plain_encoder(config: ConvMAEConfig, recompute: Collection[str] = ()) -> Encoder | ViTEncoder:
    """An encoder without fusion and final norm, so that every parameter gets a gradient; as ``Backbone`` has it."""
    plain = dataclasses.replace(config, fusion=False)
    encoder = Encoder(plain, recompute) if config.has_convolutions else ViTEncoder(plain, "stage3" in recompute)
    encoder.norm = nn.Identity()
    return encoder


def set_drop_path(encoder: Encoder | ViTEncoder, rate: float) -> int:
    """Set the blocks' rates of stochastic depth, from 0 at the first to ``rate`` at the last; returns their number.

    Raises:
        ModelConfigError: If the rate is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ModelConfigError("drop_path", "must be in [0, 1)", rate, "the official fine-tuning uses 0.1")
    if isinstance(encoder, Encoder):
        blocks = [*encoder.blocks1, *encoder.blocks2, *encoder.blocks3]
    else:
        blocks = [*encoder.blocks]
    for place, block in enumerate(blocks):  # no tensors: models are also built without memory, to learn their names
        block.drop_path = rate * place / max(1, len(blocks) - 1)
    return len(blocks)


def load_encoder(encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load an encoder without final norm; arguments and errors are those of ``Backbone.load``."""
    given = {name.removeprefix("encoder.").removeprefix("decoder."): value for name, value in state.items()}
    wanted = encoder.state_dict()
    check_names(given, wanted, _NOT_OF_THE_MAPS)
    encoder.load_state_dict({name: given[name] for name in wanted})
