"""The encoder: two convolution stages and a transformer over visible patches only.

Letters: B images, L patches, K visible patches, N visible tokens of a stage, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.blocks import TRANSFORMER_EPS, ConvBlock, PatchEmbed, TokenConv, TransformerBlock, initialise_linear
from model.config import CELL_PIXELS, ConvMAEConfig
from model.masking import flat_positions, gather_tokens, scatter_tokens, token_positions
from model.position import position_parameter


class Encoder(nn.Module):
    """Images and the positions that may be seen -> fused tokens. Parameter names are the official ones."""

    def __init__(self, config: ConvMAEConfig) -> None:
        super().__init__()
        self.config = config
        dim1, dim2, dim3 = config.embed_dim
        ratio1, ratio2, ratio3 = config.mlp_ratio
        depth1, depth2, depth3 = config.depth
        self.patch_embed1 = PatchEmbed(3, dim1, 4)
        self.patch_embed2 = PatchEmbed(dim1, dim2, 2)
        self.patch_embed3 = PatchEmbed(dim2, dim3, 2)
        self.patch_embed4 = nn.Linear(dim3, dim3)
        if config.fusion:
            self.stage1_output_decode = TokenConv(dim1, dim3, 4)
            self.stage2_output_decode = TokenConv(dim2, dim3, 2)
        self.pos_embed = position_parameter(config.position, dim3, config.grid)
        self.blocks1 = nn.ModuleList(ConvBlock(dim1, ratio1, config.kernel_size) for _ in range(depth1))
        self.blocks2 = nn.ModuleList(ConvBlock(dim2, ratio2, config.kernel_size) for _ in range(depth2))
        self.blocks3 = nn.ModuleList(TransformerBlock(dim3, config.num_heads, ratio3) for _ in range(depth3))
        self.norm = nn.LayerNorm(dim3, eps=TRANSFORMER_EPS)
        # Of the three embeddings, the official code initialises this one (models_convmae.py, initialize_weights).
        nn.init.xavier_uniform_(self.patch_embed3.proj.weight.flatten(1))
        self.apply(initialise_linear)

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Encode what is visible.

        Args:
            images: (B, 3, H, W), normalised.
            kept: (B, K) visible patches or, with random masking, visible cells.

        Returns:
            (B, K, C) in the order of kept; with random masking (B, L, C), every patch.
        """
        if self.config.masking == "block":
            patches, cells = kept, self._positions(kept, 2)
            x1_BNC = self._stage1(images, cells)
        else:
            patches, cells = self.all_patches(images), kept
            x1_BNC = self._spread(self._stage1(images, cells), cells, self._positions(patches, 2))
        x2_BNC = self._conv_stage(self.blocks2, self.patch_embed2(x1_BNC), self._positions(patches, 1), 1)
        x3_BNC = self._stage3(x2_BNC, patches)
        if self.config.fusion:
            x3_BNC = x3_BNC + self.stage1_output_decode(x1_BNC) + self.stage2_output_decode(x2_BNC)
        out: Tensor = self.norm(x3_BNC)
        return out

    def all_patches(self, images: Tensor) -> Tensor:
        """(B, L): every patch of every image, in raster order."""
        return torch.arange(self.config.patches, device=images.device).expand(images.shape[0], -1)

    def _stage1(self, images: Tensor, cells: Tensor) -> Tensor:
        x_BNC = self.patch_embed1(_cell_pixels(images, cells))
        return self._conv_stage(self.blocks1, x_BNC, cells, 2)

    def _conv_stage(self, blocks: nn.ModuleList, x_BNC: Tensor, positions: Tensor, halvings: int) -> Tensor:
        shape = self._shape(halvings)
        flat = flat_positions(positions, shape[0] * shape[1])
        for block in blocks:
            x_BNC = block(x_BNC, flat, shape)
        return x_BNC

    def _stage3(self, x_BNC: Tensor, patches: Tensor) -> Tensor:
        x_BNC = self.patch_embed4(self.patch_embed3(x_BNC)) + functional.embedding(patches, self.pos_embed[0])
        for block in self.blocks3:
            x_BNC = block(x_BNC)
        return x_BNC

    def _spread(self, x_BNC: Tensor, cells: Tensor, every_cell: Tensor) -> Tensor:
        """Random masking only: masked cells become zeros, so that stage 2 sees whole patches but no masked pixel."""
        shape = self._shape(2)
        tokens = shape[0] * shape[1]
        x_BHWC = scatter_tokens(x_BNC, flat_positions(cells, tokens), shape)
        return gather_tokens(x_BHWC, flat_positions(every_cell, tokens))

    def _shape(self, halvings: int) -> tuple[int, int]:
        rows, columns = self.config.grid
        return rows << halvings, columns << halvings

    def _positions(self, patches: Tensor, halvings: int) -> Tensor:
        return token_positions(patches, self.config.grid[1], halvings)


def _cell_pixels(images: Tensor, cells: Tensor) -> Tensor:
    """The pixels of some 4x4 cells, Z-ordered within a cell: (B, 3, H, W), (B, N) -> (B, 16 * N, 3)."""
    B, _, H, W = images.shape
    rows, columns = H // CELL_PIXELS, W // CELL_PIXELS
    x = images.reshape(B, 3, rows, 2, 2, columns, 2, 2).permute(0, 2, 5, 3, 6, 4, 7, 1)  # a view of rows, columns, cell
    batch = torch.arange(B, device=images.device)[:, None]
    return x[batch, cells // columns, cells % columns].flatten(1, -2)
