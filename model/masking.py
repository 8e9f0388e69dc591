"""Which patches the encoder sees, and where their tokens lie in each stage's map.

Letters: B images, L patches (or cells, with random masking), K of them kept, N tokens, C channels.

Tokens of one patch are kept in Z-order: its four quarters in (row, column) order, in each quarter its four cells.
So every embedding and fusion convolution, none of which looks across patches, is a reshape and a matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """One mask per image."""

    kept: Tensor
    """(B, K) int64: visible patches in raster order."""
    hidden: Tensor
    """(B, L - K) int64: masked patches in raster order."""
    mask: Tensor
    """(B, L) float32: 1 where masked, 0 where visible."""


def draw_mask(noise: Tensor, kept: int) -> Mask:
    """Keep the patches with the smallest noise and mask the rest.

    The noise is an argument, so the caller owns the randomness. Equal noise is decided by position, so the same
    noise gives the same mask on every device.

    Args:
        noise: (B, L), one draw per patch.
        kept: K, how many stay visible.

    Source: He et al. 2022, arXiv:2111.06377, section 3.
    """
    order = noise.argsort(dim=1, stable=True)
    shown, hidden = order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values
    mask = torch.ones(noise.shape, dtype=torch.float32, device=noise.device).scatter(1, shown, 0.0)
    return Mask(shown, hidden, mask)


def token_positions(patches: Tensor, columns: int, halvings: int) -> Tensor:
    """Raster positions of the tokens of some patches in the map of an earlier stage.

    Args:
        patches: (B, K) patches by raster position.
        columns: Patches in a row of the image.
        halvings: 0 for stage 3, 1 for stage 2 (4 tokens a patch), 2 for stage 1 (16 tokens a patch).

    Returns:
        (B, K * 4**halvings), Z-ordered within a patch.
    """
    row, column = patches // columns, patches % columns
    corner = torch.arange(4, device=patches.device)
    for _ in range(halvings):
        row = (2 * row[..., None] + corner // 2).flatten(1)
        column = (2 * column[..., None] + corner % 2).flatten(1)
    return row * (columns << halvings) + column


def flat_positions(positions: Tensor, tokens: int) -> Tensor:
    """(B, N) positions in each image's map of so many tokens -> (B * N,) positions in the batch of maps."""
    first = torch.arange(positions.shape[0], device=positions.device)[:, None] * tokens
    return (positions + first).flatten()


def scatter_tokens(x_BNC: Tensor, flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """Lay tokens into a map that is zero elsewhere.

    Args:
        x_BNC: Visible tokens.
        flat: Their ``flat_positions``.
        shape: Rows and columns of the map.

    Returns:
        (B, rows, columns, C).
    """
    B, _, C = x_BNC.shape
    empty = x_BNC.new_zeros(B * shape[0] * shape[1], C)
    return empty.index_copy(0, flat, x_BNC.flatten(0, 1)).view(B, *shape, C)


def gather_tokens(x_BHWC: Tensor, flat: Tensor) -> Tensor:
    """The inverse of ``scatter_tokens``: (B, rows, columns, C) -> (B, N, C)."""
    B, _, _, C = x_BHWC.shape
    return x_BHWC.flatten(0, 2).index_select(0, flat).view(B, -1, C)
