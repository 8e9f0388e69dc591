from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from model.blocks import TokenConv
from model.masking import flat_positions, gather_tokens, token_positions


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_token_convolution_is_the_convolution_that_it_stands_for(side: int) -> None:
    torch.manual_seed(0)
    layer = TokenConv(3, 7, side)
    rows, columns, halvings = 2, 3, side.bit_length() - 1
    image = torch.randn(2, 3, rows * side, columns * side)
    patches = torch.arange(rows * columns).expand(2, -1)
    flat = flat_positions(token_positions(patches, columns, halvings), rows * columns * side**2)

    tokens = layer(gather_tokens(image.permute(0, 2, 3, 1), flat))

    expected = functional.conv2d(image, layer.weight, layer.bias, stride=side).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected)
