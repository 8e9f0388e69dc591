"""The encoder: two convolution stages and a transformer over visible patches only.

Letters: B images, V views of each, L patches, K visible ones of a view, N visible tokens of all views, C channels.

In stages 1 and 2 the tokens of a patch follow each other by row and column, so that every embedding and fusion
convolution, none of which looks across patches, is a reshape and a matrix product. Views of an image share its pixels
and nothing else: what each of them sees is encoded as if it were an image of its own.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.blocks import TRANSFORMER_EPS, ConvBlock, PatchEmbed, TokenConv, TransformerBlock, initialise_linear, run
from model.config import CELL_PIXELS, PATCH_PIXELS, ConvMAEConfig
from model.depthwise import surrounding_tokens
from model.masking import all_patches
from model.pixels import patch_grid, square_pixels
from model.position import interpolated, position_parameter


class Encoder(nn.Module):
    """Images and the positions that may be seen -> fused tokens. Parameter names are the official ones.

    Args:
        config: The model's shape, with convolution stages.
        recompute: Of ``stage1``, ``stage2``, ``stage3``, those whose blocks are computed again in the backward pass.
    """

    def __init__(self, config: ConvMAEConfig, recompute: Collection[str] = ()) -> None:
        super().__init__()
        self.config = config
        self.recompute = frozenset(recompute)
        dim1, dim2, dim3 = config.embed_dim
        ratio1, ratio2, ratio3 = config.mlp_ratio
        depth1, depth2, depth3 = config.depth
        self.patch_embed1 = PatchEmbed(config.in_channels, dim1, 4)
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
        self.norm: nn.Module = nn.LayerNorm(dim3, eps=TRANSFORMER_EPS)
        # Of the three embeddings, the official code initialises this one (models_convmae.py, initialize_weights).
        nn.init.xavier_uniform_(self.patch_embed3.proj.weight.flatten(1))
        self.apply(initialise_linear)

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Encode what is visible.

        Args:
            images: (B, in_channels, H, W), normalised; of another size than the model's positions are interpolated.
            kept: (B * V, K) visible patches or, with random masking, visible cells; views of an image one after the
                other, V as many as there are.

        Returns:
            (B * V, K, C) in the order of kept; with random masking (B * V, L, C), every patch.
        """
        x1_NC, grid = self._stage1(images, kept), patch_grid(images)
        if self.config.masking == "block":
            patches = kept
        else:
            patches = all_patches(kept.shape[0], grid[0] * grid[1], kept.device)
            x1_NC = _spread(x1_NC, kept, grid)
        x2_NC = self.patch_embed2(x1_NC, 4)
        surroundings = surrounding_tokens(patches, grid, 2, self.config.kernel_size)
        x2_NC = self._run("stage2", self.blocks2, x2_NC, surroundings)
        x3_BNC = self._stage3(x2_NC, patches, grid)
        if self.config.fusion:
            fused = self.stage1_output_decode(x1_NC, 4) + self.stage2_output_decode(x2_NC, 2)
            x3_BNC = x3_BNC + fused.view_as(x3_BNC)
        out: Tensor = self.norm(x3_BNC)
        return out

    def _stage1(self, images: Tensor, kept: Tensor) -> Tensor:
        pixels = self.config.mask_pixels
        of_images = kept.reshape(images.shape[0], -1)
        x_NC = self.patch_embed1(square_pixels(images, of_images, pixels).flatten(0, 2), pixels)
        side = pixels // CELL_PIXELS
        units = (images.shape[2] // pixels, images.shape[3] // pixels)
        surroundings = surrounding_tokens(kept, units, side, self.config.kernel_size)
        return self._run("stage1", self.blocks1, x_NC, surroundings)

    def _stage3(self, x_NC: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        x_BNC: Tensor = self.patch_embed4(self.patch_embed3(x_NC, 2)).view(*patches.shape, -1)
        x_BNC = x_BNC + functional.embedding(patches, interpolated(self.pos_embed, self.config.grid, grid)[0])
        return self._run("stage3", self.blocks3, x_BNC)

    def _run(self, stage: str, blocks: nn.ModuleList, x: Tensor, *args: Tensor) -> Tensor:
        for block in blocks:
            x = run(block, x, *args, recompute=stage in self.recompute)
        return x


def _spread(x_NC: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Random masking only: masked cells become zeros, so that stage 2 sees whole patches but no masked pixel."""
    side, patches = PATCH_PIXELS // CELL_PIXELS, grid[0] * grid[1]
    columns = grid[1] * side
    row, column = cells // columns, cells % columns
    patch = row // side * grid[1] + column // side
    first = torch.arange(cells.shape[0], device=cells.device)[:, None] * patches
    place = (first + patch) * side**2 + row % side * side + column % side
    empty = x_NC.new_zeros(cells.shape[0] * patches * side**2, x_NC.shape[1])
    spread: Tensor = empty.index_copy(0, place.flatten(), x_NC)
    return spread
