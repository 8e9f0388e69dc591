"""Position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def sincos_position(dim: int, grid: tuple[int, int], class_tokens: int = 0) -> Tensor:
    """The fixed sine-cosine embedding: half of the channels for the column, half for the row.

    Args:
        dim: Channels, a multiple of 4.
        grid: Rows and columns of patches.
        class_tokens: Tokens before those of the patches; zeros.

    Returns:
        (1, class_tokens + L, dim) float32.

    Source: util/pos_embed.py of github.com/facebookresearch/mae, which also has the column first.
    """
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = [coordinate.flatten()[:, None] * omega for coordinate in (column, row)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()
    return functional.pad(waves, (0, 0, class_tokens, 0))[None]


def position_parameter(kind: str, dim: int, grid: tuple[int, int], class_tokens: int = 0) -> nn.Parameter:
    """The embedding of one of config.POSITIONS as a parameter; ``none`` is frozen zeros, so that names never change."""
    if kind == "sincos":
        return nn.Parameter(sincos_position(dim, grid, class_tokens), requires_grad=False)
    position = torch.zeros(1, class_tokens + grid[0] * grid[1], dim)
    if kind == "none":
        return nn.Parameter(position, requires_grad=False)
    return nn.Parameter(nn.init.normal_(position, std=0.02))


def interpolated(position: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """An embedding for another grid of patches, bicubic; the same tensor where the grid is the same.

    Args:
        position: (1, L, C).
        grid: Its rows and columns of patches.
        wanted: Those of the result.
    """
    if grid == wanted:
        return position
    maps = position.view(1, *grid, -1).permute(0, 3, 1, 2)
    return functional.interpolate(maps, wanted, mode="bicubic", align_corners=False).flatten(2).mT
