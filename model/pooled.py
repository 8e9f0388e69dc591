"""The pretrained encoder as classification pools it: whole images in, one vector for each out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from model import dense
from model.backbone import load_encoder, plain_encoder
from model.blocks import TRANSFORMER_EPS
from model.config import PATCH_PIXELS, ConvMAEConfig
from model.errors import ModelConfigError


class PooledEncoder(nn.Module):
    """The mean over all patches after the last block, then a LayerNorm.

    ``norm``, the last one of pretraining, is left out: there it sees tokens to which fusion has added the first two
    stages. The official fine-tuning deletes it and puts ``fc_norm`` behind the mean, which nothing has trained before.

    Args:
        config: That of the pretraining, with its image size: position embeddings are interpolated from there.

    Source: models_convvit.py of github.com/Alpha-VL/ConvMAE with ``global_pool``, and for MAE models_vit.py of
    github.com/facebookresearch/mae.
    """

    def __init__(self, config: ConvMAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = plain_encoder(config)
        self.fc_norm = nn.LayerNorm(config.embed_dim[2], eps=TRANSFORMER_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) normalised, H and W multiples of 16 -> (B, C).

        Raises:
            ModelConfigError: The shape is another one, or the images were not normalised.
        """
        out: Tensor = self.fc_norm(
            dense.last_tokens(self.encoder, checked_images(images, self.config.in_channels)).mean(dim=1)
        )
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a pretrained model, as ``Backbone.load`` does; ``fc_norm`` stays as it is."""
        load_encoder(self.encoder, state)


def checked_images(images: Tensor, channels: int) -> Tensor:
    """The images.

    Raises:
        ModelConfigError: They are not (B, channels, H, W) with sides that are whole patches, or were not normalised.
    """
    if images.ndim != 4 or images.shape[1] != channels or any(side % PATCH_PIXELS for side in images.shape[2:]):
        rule = f"must have shape (batch, {channels}, height, width), sides multiples of {PATCH_PIXELS}"
        raise ModelConfigError("images", rule, tuple(images.shape), "resize them")
    if not images.is_floating_point():
        raise ModelConfigError("images", "must be normalised floats", images.dtype, "pass them through normalise()")
    return images
