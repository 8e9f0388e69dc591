"""The decoder: a transformer over visible and mask tokens that predicts the pixels of patches.

Letters: B images or views of images, L tokens of one, K visible ones, M to predict, P pixels of one, C channels. Tokens
are patches; MAE has a class token before them, which is always visible.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.blocks import TRANSFORMER_EPS, TransformerBlock, initialise_linear, run
from model.config import ConvMAEConfig
from model.position import interpolated, position_parameter


class Decoder(nn.Module):
    """Fused tokens -> predicted pixels. Parameter names are the official ones.

    Args:
        config: The model's shape.
        recompute: Whether blocks are computed again in the backward pass, to save memory.
    """

    def __init__(self, config: ConvMAEConfig, recompute: bool = False) -> None:
        super().__init__()
        dim, ratio = config.decoder_dim, config.mlp_ratio[0]
        self.class_tokens = config.class_tokens
        self.grid = config.grid
        self.recompute = recompute
        self.decoder_embed = nn.Linear(config.embed_dim[2], dim)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, dim), std=0.02))
        self.decoder_pos_embed = position_parameter("sincos", dim, config.grid, config.class_tokens)
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(dim, config.decoder_num_heads, ratio) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=TRANSFORMER_EPS)
        self.decoder_pred = nn.Linear(dim, config.patch_values)
        self.apply(initialise_linear)

    def forward(self, latent_BKC: Tensor, visible: Tensor, wanted: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Predict patches.

        Two things are saved. Before the first block mixes tokens, a mask token depends on its place alone: its
        queries, keys and values are computed once for the batch. The last block mixes from all tokens, but what
        follows is computed for wanted patches only.

        Args:
            latent_BKC: Tokens of the encoder.
            visible: (B, K) patches that they belong to, without the class token.
            wanted: (B, M) patches to predict; None for all of them, in raster order.
            grid: Rows and columns of patches of the images; positions are interpolated to them.

        Returns:
            (B, M, P), pixels in (row, column, channel) order.
        """
        places = functional.pad(visible + self.class_tokens, (self.class_tokens, 0))
        position_1LC = self.position(grid)
        seen_BKC = self.decoder_embed(latent_BKC) + functional.embedding(places, position_1LC[0])
        hidden_1LC = self.mask_token + position_1LC
        first, *others = self.decoder_blocks
        assert isinstance(first, TransformerBlock)
        x_BLC = _spread(hidden_1LC, seen_BKC, places)
        qkv_BLD = _spread(first.qkv(hidden_1LC), first.qkv(seen_BKC), places)
        # Of each block, the tokens whose results are used.
        used = [None] * len(others) + [None if wanted is None else wanted + self.class_tokens]
        x_BLC = run(first.advance, x_BLC, qkv_BLD, used[0], recompute=self.recompute)
        for block, tokens in zip(others, used[1:], strict=True):
            x_BLC = run(block, x_BLC, tokens, recompute=self.recompute)
        if wanted is None:
            x_BLC = x_BLC[:, self.class_tokens :]
        prediction: Tensor = self.decoder_pred(self.decoder_norm(x_BLC))
        return prediction

    def position(self, grid: tuple[int, int]) -> Tensor:
        """(1, L, C) embedding of the tokens of a grid of patches."""
        return interpolated(self.decoder_pos_embed, self.grid, grid, self.class_tokens)


def _spread(hidden_1LC: Tensor, seen_BKC: Tensor, places: Tensor) -> Tensor:
    """(B, L, C): what is seen in its places, (B, K), and what stands for hidden tokens everywhere else."""
    B, _, C = seen_BKC.shape
    return hidden_1LC.expand(B, -1, -1).scatter(1, places[..., None].expand(-1, -1, C), seen_BKC)
