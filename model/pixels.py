"""Conversions between images and what the model reads and predicts: normalisation, patches, targets.

Letters: B images, C channels, L patches, P = 256 * C values of a patch, laid out (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.channel_statistics import ChannelStatistics
from model.config import PATCH_PIXELS


def normalise(images: Tensor, statistics: ChannelStatistics) -> Tensor:
    """uint8 or uint16 (B, C, H, W) -> float32, of mean 0 and deviation 1 where images are such, on their device."""
    mean, std = _per_channel(statistics.mean, images), _per_channel(statistics.std, images)
    most = torch.iinfo(images.dtype).max
    return (images.to(torch.float32) - most * mean) / (most * std)


def denormalise(images: Tensor, statistics: ChannelStatistics) -> Tensor:
    """The inverse of ``normalise``, rounded and clipped to uint8."""
    mean, std = _per_channel(statistics.mean, images), _per_channel(statistics.std, images)
    return ((images.to(torch.float32) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    # Filled on the device: copying floats from the host would wait for the queue of kernels.
    columns = [torch.full((1, 1, 1), value, dtype=torch.float32, device=images.device) for value in values]
    return torch.cat(columns)


def patch_grid(images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches in (B, C, H, W) images."""
    height, width = images.shape[2:]
    return height // PATCH_PIXELS, width // PATCH_PIXELS


def patchify(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, P)."""
    return _squares(images, PATCH_PIXELS).flatten(3).flatten(1, 2)


def square_pixels(images: Tensor, squares: Tensor, side: int) -> Tensor:
    """The pixels of some squares of images.

    Args:
        images: (B, C, H, W).
        squares: (B, K) places in raster order.
        side: Of a square, in pixels.

    Returns:
        (B, K, side**2, C), by row and column.
    """
    x = _squares(images, side)
    image = torch.arange(images.shape[0], device=images.device)[:, None]
    return x[image, squares // x.shape[2], squares % x.shape[2]].flatten(2, 3)


def _squares(images: Tensor, side: int) -> Tensor:
    """A view: (B, C, H, W) -> (B, H / side, W / side, side, side, C)."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // side, side, W // side, side)
    return x.permute(0, 2, 4, 3, 5, 1)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, P) -> (B, C, H, W).

    Args:
        patches: Values in (row, column, channel) order.
        grid: Rows and columns of patches, ``config.grid``.
    """
    x = patches.reshape(-1, *grid, PATCH_PIXELS, PATCH_PIXELS, patches.shape[-1] // PATCH_PIXELS**2)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch, as ``norm_pix`` uses them: prediction * deviation + mean is pixels again.

    Args:
        patches: (B, L, P).

    Returns:
        Two tensors (B, L, 1). The variance is unbiased, plus 1e-6 (models_convmae.py, forward_loss).
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
