from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.depthwise import DepthwiseConv, surrounding_tokens

GRID, CHANNELS, IMAGES, KEPT = (3, 4), 6, 2, 5


def scene(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Visible units of each image, their tokens, and the row of each token in the flattened maps."""
    generator = torch.Generator().manual_seed(side)
    units = torch.stack([torch.randperm(12, generator=generator)[:KEPT].sort().values for _ in range(IMAGES)])
    tokens = torch.randn(IMAGES * KEPT * side**2, CHANNELS, generator=generator, dtype=torch.float64)
    width = GRID[1] * side
    inner = torch.arange(side)
    rows = (units // GRID[1] * side)[..., None, None] + inner[:, None]
    columns = (units % GRID[1] * side)[..., None, None] + inner[None, :]
    image = torch.arange(IMAGES)[:, None, None, None] * 12 * side**2
    return units, tokens, (image + rows * width + columns).flatten()


def on_whole_maps(conv: DepthwiseConv, tokens: Tensor, places: Tensor, side: int) -> Tensor:
    """What the official code does: a convolution over maps of which the masked part is zero."""
    empty = tokens.new_zeros(IMAGES * 12 * side**2, CHANNELS)
    maps = empty.index_copy(0, places, tokens).view(IMAGES, GRID[0] * side, GRID[1] * side, CHANNELS)
    padding = conv.kernel_size[0] // 2
    out = functional.conv2d(maps.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=padding, groups=CHANNELS)
    return out.permute(0, 2, 3, 1).reshape(-1, CHANNELS)[places]


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 13])
@pytest.mark.parametrize("side", [1, 2, 4])
def test_values_and_gradients_are_those_of_a_convolution_over_the_masked_map(side: int, kernel_size: int) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv(CHANNELS, kernel_size).double()
    units, tokens, places = scene(side)
    tokens.requires_grad_()
    inputs = (tokens, conv.weight, conv.bias)

    out = conv(tokens, surrounding_tokens(units, GRID, side, kernel_size))
    expected = on_whole_maps(conv, tokens, places, side)

    torch.testing.assert_close(out, expected)
    towards = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, towards)
    for gradient, reference in zip(found, torch.autograd.grad(expected, inputs, towards), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_what_lies_outside_the_image_or_is_masked_is_the_row_behind_the_last(side: int) -> None:
    units = torch.tensor([[0]])

    rows = surrounding_tokens(units, (1, 1), side, 3)

    assert rows.shape == (1, side + 2, side + 2)
    assert rows[0, 1:-1, 1:-1].flatten().tolist() == list(range(side**2))
    assert (rows == side**2).sum() == (side + 2) ** 2 - side**2
