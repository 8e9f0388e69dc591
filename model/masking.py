"""Masks: which patches the encoder sees.

Letters: B images, V views of each, N = B * V masks, L patches (or cells, with random masking), K of them kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """One mask for each view of each image; the views of an image follow each other."""

    kept: Tensor
    """(N, K) int64: visible patches in raster order."""
    hidden: Tensor
    """(N, L - K) int64: masked patches in raster order."""
    mask: Tensor
    """(N, L) float32: 1 where masked, 0 where visible."""


def all_patches(images: int, patches: int, device: torch.device) -> Tensor:
    """(images, patches) int64: every patch of every image, in raster order."""
    return torch.arange(patches, device=device).expand(images, -1)


def draw_mask(noise: Tensor, kept: int, views: int = 1) -> Mask:
    """Keep the patches with the smallest noise and mask the rest; in the next view, keep those that come next.

    The noise is an argument, so the caller owns the randomness. Equal noise is decided by position, so the same
    noise gives the same mask on every device.

    Args:
        noise: (B, L), one draw per patch, which all views of an image share.
        kept: K, how many stay visible: view v keeps those of the ranks [v * K, (v + 1) * K).
        views: V. With V * K = L each patch is visible in exactly one of them.

    Source: He et al. 2022, arXiv:2111.06377, section 3; views: ``random_masking`` in models_fastconvmae.py of
    github.com/Alpha-VL/FastConvMAE.
    """
    order, patches = noise.argsort(dim=1, stable=True), noise.shape[1]
    if views > 1:
        turns = kept * torch.arange(views, device=noise.device)[:, None]
        order = order[:, (turns + torch.arange(patches, device=noise.device)) % patches].flatten(0, 1)
    shown, hidden = order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values
    mask = torch.ones(order.shape, dtype=torch.float32, device=noise.device).scatter(1, shown, 0.0)
    return Mask(shown, hidden, mask)
