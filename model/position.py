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


def interpolated(position: Tensor, grid: tuple[int, int], wanted: tuple[int, int], class_tokens: int = 0) -> Tensor:
    """An embedding for another grid of patches, bicubic; the same tensor where the grid is the same.

    Of rows, then of columns, as products with the weights of ``functional.interpolate``: its own gradient has other
    bits each time on a GPU. In float64, which autocast leaves alone; these are some thousand numbers.

    Args:
        position: (1, class_tokens + L, C).
        grid: Its rows and columns of patches.
        wanted: Those of the result.
        class_tokens: Tokens before those of the patches, which stay as they are.
    """
    if grid == wanted:
        return position
    rows, columns = (_bicubic(*sides, position.device) for sides in zip(grid, wanted, strict=True))
    maps_HWC = position[0, class_tokens:].double().view(*grid, -1)
    maps_HWC = columns @ (rows @ maps_HWC.flatten(1)).view(wanted[0], grid[1], -1)
    return torch.cat([position[:, :class_tokens], maps_HWC.flatten(0, 1)[None].to(position.dtype)], dim=1)


def _bicubic(before: int, after: int, device: torch.device) -> Tensor:
    """(after, before) float64: the weight of each of ``before`` places in a row in each of ``after`` places."""
    each = torch.eye(before, dtype=torch.float64, device=device).view(1, before, before, 1)
    return functional.interpolate(each, (after, 1), mode="bicubic", align_corners=False).view(before, after).mT
