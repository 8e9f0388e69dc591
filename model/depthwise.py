"""The depthwise convolution of a masked block, computed for visible tokens only.

Letters: B images, K visible units of an image, P = B * K, N = P * side**2 visible tokens, C channels, k the kernel's
side, h = side + k - 1. A unit is a square of `side` x `side` tokens that are visible together: a patch, or with random
masking a single cell.

Each unit is laid out with the tokens around it, zeros where they are masked, as a small map of h x h places; a
convolution without padding then gives the unit. Against a convolution over the whole map, of which a quarter is
visible, the arithmetic is a quarter, and the gradient of the kernel, for which the CPU library has no fast routine,
becomes one matrix product a channel. docs/decisions/0010-masked-convolution.md has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution that acts on visible tokens; masked ones count as zero."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x_NC: Tensor, surroundings: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C) -> (N, C).

        Args:
            x_NC: Visible tokens, unit after unit, in a unit by row and column.
            surroundings: (P, h, h) rows of x_NC, from ``surrounding_tokens``.
        """
        out: Tensor = _MaskedDepthwise.apply(x_NC, self.weight, self.bias, surroundings)  # type: ignore[no-untyped-call]
        return out


def surrounding_tokens(units: Tensor, grid: tuple[int, int], side: int, kernel_size: int) -> Tensor:
    """Find the visible tokens around each unit.

    Args:
        units: (B, K) visible units by raster position.
        grid: Rows and columns of units in an image.
        side: Of a unit, in tokens.
        kernel_size: Odd.

    Returns:
        (P, h, h) int64: rows of the (N, C) visible tokens; N where a place is masked or outside the image.
    """
    B, K = units.shape
    reach = kernel_size // 2
    margin = -(-reach // side)  # units
    columns = grid[1] + 2 * margin
    rank = torch.arange(B * K, device=units.device).view(B, K)
    place = (units // grid[1] + margin) * columns + units % grid[1] + margin
    ranks = torch.full((B, (grid[0] + 2 * margin) * columns), -1, device=units.device).scatter(1, place, rank)

    offset = torch.arange(-reach, side + reach, device=units.device)
    unit, inner = offset.div(side, rounding_mode="floor"), offset.remainder(side)
    around = unit[:, None] * columns + unit[None, :]
    found = ranks.gather(1, (place[..., None, None] + around).flatten(1)).view(B * K, *around.shape)
    tokens = found * side**2 + inner[:, None] * side + inner[None, :]
    return tokens.masked_fill(found < 0, B * K * side**2)


class _MaskedDepthwise(torch.autograd.Function):
    """Forward and backward both gather surroundings, of tokens and of their gradients; nothing is scattered."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight: Tensor, bias: Tensor, surroundings: Tensor) -> Tensor:
        ctx.save_for_backward(x_NC, weight, surroundings)
        return _convolved(_laid_out(x_NC, surroundings), weight.to(x_NC.dtype), bias.to(x_NC.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_NC, weight, surroundings = ctx.saved_tensors
        grad_NC = gradients[0]
        grad_PHHC = _laid_out(grad_NC, surroundings)
        grad_x = _convolved(grad_PHHC, weight.to(grad_NC.dtype).flip(2, 3), None)
        grad_weight = _kernel_gradient(x_NC, grad_PHHC, weight.shape[-1]).to(weight.dtype)
        return grad_x, grad_weight, grad_NC.sum(0, dtype=weight.dtype), None


def _laid_out(x_NC: Tensor, surroundings: Tensor) -> Tensor:
    """(N, C) -> (P, h, h, C), zeros where nothing is visible."""
    with_zero = torch.cat([x_NC, x_NC.new_zeros(1, x_NC.shape[1])])
    return with_zero.index_select(0, surroundings.flatten()).view(*surroundings.shape, -1)


def _convolved(x_PHHC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(P, h, h, C) -> (N, C); the permutes are views, as convolutions take channels-last maps."""
    out = functional.conv2d(x_PHHC.permute(0, 3, 1, 2), weight, bias, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])


def _kernel_gradient(x_NC: Tensor, grad_PHHC: Tensor, k: int) -> Tensor:
    """(C, 1, k, k): products of all tokens and gradients of a unit, of which each place of a kernel sums a diagonal."""
    P, h, _, C = grad_PHHC.shape
    side = h - k + 1
    x_CPT = x_NC.to(grad_PHHC.dtype).t().contiguous().view(C, P, side**2)
    grad_CPS = grad_PHHC.view(-1, C).t().contiguous().view(C, P, h * h)
    sums = torch.promote_types(grad_PHHC.dtype, torch.float32)
    products = torch.bmm(x_CPT.mT, grad_CPS).to(sums)  # (C, side**2, h * h)
    row, column = side * h * h + h, h * h + 1
    diagonals = products.as_strided((C, k, k, side, side), (side**2 * h * h, h, 1, row, column))
    return diagonals.sum((3, 4)).flip(1, 2)[:, None]
