"""The decoder: a transformer over visible and mask tokens that predicts the pixels of patches.

Letters: B images, L patches, K visible ones, M patches to predict, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.blocks import TRANSFORMER_EPS, TransformerBlock, initialise_linear
from model.config import PATCH_PIXELS, ConvMAEConfig
from model.position import position_parameter


class Decoder(nn.Module):
    """Fused tokens -> predicted pixels. Parameter names are the official ones."""

    def __init__(self, config: ConvMAEConfig) -> None:
        super().__init__()
        dim, ratio = config.decoder_dim, config.mlp_ratio[0]
        self.decoder_embed = nn.Linear(config.embed_dim[2], dim)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, dim), std=0.02))
        self.decoder_pos_embed = position_parameter("sincos", dim, config.grid)
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(dim, config.decoder_num_heads, ratio) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=TRANSFORMER_EPS)
        self.decoder_pred = nn.Linear(dim, PATCH_PIXELS**2 * 3)
        self.apply(initialise_linear)

    def forward(self, latent_BKC: Tensor, visible: Tensor, wanted: Tensor | None) -> Tensor:
        """Predict patches.

        Args:
            latent_BKC: Tokens of the encoder.
            visible: (B, K), the patches that they belong to.
            wanted: (B, M) patches to predict; None for all of them, in raster order.

        Returns:
            (B, M, 768), pixels in (row, column, channel) order.
        """
        latent_BKC = self.decoder_embed(latent_BKC)
        B, _, C = latent_BKC.shape
        hidden_BLC = self.mask_token.to(latent_BKC.dtype).expand(B, self.decoder_pos_embed.shape[1], C)
        x_BLC = hidden_BLC.scatter(1, visible[..., None].expand(-1, -1, C), latent_BKC) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x_BLC = block(x_BLC)
        if wanted is not None:  # the head costs as much as a block: not for patches that no one asks for
            x_BLC = x_BLC.gather(1, wanted[..., None].expand(-1, -1, C))
        prediction: Tensor = self.decoder_pred(self.decoder_norm(x_BLC))
        return prediction
