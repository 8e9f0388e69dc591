"""Masks: which patches the encoder sees.

Letters: B images, L patches (or cells, with random masking), K of them kept.
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


def all_patches(images: int, patches: int, device: torch.device) -> Tensor:
    """(images, patches) int64: every patch of every image, in raster order."""
    return torch.arange(patches, device=device).expand(images, -1)


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
