"""The encoder of MAE (He et al. 2022, arXiv:2111.06377), the baseline that the paper compares with: a plain ViT.

Letters: B images, V views of each, K visible patches of a view, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.blocks import TRANSFORMER_EPS, TokenConv, TransformerBlock, initialise_linear, run
from model.config import PATCH_PIXELS, ConvMAEConfig
from model.pixels import patch_grid, square_pixels
from model.position import interpolated, position_parameter


class PixelEmbed(nn.Module):
    """Patches of pixels to tokens, without norm."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = TokenConv(channels, dim, PATCH_PIXELS)
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        """(B, in_channels, H, W), (B * V, K) -> (B * V, K, C)."""
        of_images = patches.reshape(images.shape[0], -1)
        x_NC: Tensor = self.proj(square_pixels(images, of_images, PATCH_PIXELS).flatten(0, 2), PATCH_PIXELS)
        return x_NC.view(*patches.shape, -1)


class ViTEncoder(nn.Module):
    """Images and the patches that may be seen -> tokens. Parameter names are those of models_mae.py.

    Args:
        config: The model's shape, without convolution stages.
        recompute: Whether blocks are computed again in the backward pass, to save memory.
    """

    def __init__(self, config: ConvMAEConfig, recompute: bool = False) -> None:
        super().__init__()
        dim = config.embed_dim[2]
        self.recompute = recompute
        self.grid = config.grid
        self.patch_embed = PixelEmbed(config.in_channels, dim)
        self.cls_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = position_parameter(config.position, dim, config.grid, config.class_tokens)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, config.num_heads, config.mlp_ratio[2]) for _ in range(config.depth[2])
        )
        self.norm = nn.LayerNorm(dim, eps=TRANSFORMER_EPS)
        self.apply(initialise_linear)

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Encode what is visible.

        Args:
            images: (B, in_channels, H, W), normalised; of another size than the model's positions are interpolated.
            kept: (B * V, K) visible patches; views of an image one after the other.

        Returns:
            (B * V, 1 + K, C): the class token, then patches in the order of kept.
        """
        position = interpolated(self.pos_embed, self.grid, patch_grid(images), class_tokens=1)
        x_BKC = self.patch_embed(images, kept) + functional.embedding(kept + 1, position[0])
        class_B1C = (self.cls_token + position[:, :1]).expand(kept.shape[0], -1, -1)
        x_BKC = torch.cat([class_B1C.to(x_BKC.dtype), x_BKC], dim=1)
        for block in self.blocks:
            x_BKC = run(block, x_BKC, recompute=self.recompute)
        out: Tensor = self.norm(x_BKC)
        return out
