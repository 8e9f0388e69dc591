from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from model.blocks import TokenConv


@pytest.mark.parametrize(("side", "unit"), [(1, 1), (1, 4), (2, 2), (2, 4), (4, 4), (4, 16)])
def test_a_token_convolution_is_the_convolution_that_it_stands_for(side: int, unit: int) -> None:
    torch.manual_seed(0)
    layer = TokenConv(3, 7, side)
    units = torch.randn(5, 3, unit, unit)

    tokens = layer(units.permute(0, 2, 3, 1).reshape(-1, 3), unit)

    expected = functional.conv2d(units, layer.weight, layer.bias, stride=side).permute(0, 2, 3, 1).reshape(-1, 7)
    torch.testing.assert_close(tokens, expected)
