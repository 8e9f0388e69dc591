"""LARS against steps worked out by hand."""

from __future__ import annotations

import pytest
import torch

from jobs.rank.lars import LARS


def test_two_steps_are_those_of_the_rule() -> None:
    weight, bias = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([weight, bias], lr=2.0, weight_decay=0.1, momentum=0.9, trust=0.01)

    weight.grad, bias.grad = torch.tensor([[0.7, -0.4]]), torch.tensor([0.5])
    optimizer.step()

    # With decay the gradient is (1, 0), of norm 1; the weights' norm is 5: a ratio of 0.05.
    assert weight.tolist() == [[pytest.approx(3 - 2 * 0.05), pytest.approx(4.0)]]
    assert bias.tolist() == [pytest.approx(1 - 2 * 0.5)]
    weight.grad, bias.grad = torch.zeros(1, 2), torch.zeros(1)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    # No gradient, so no ratio; the momentum alone.
    assert weight.tolist() == [[pytest.approx(2.9 - 2 * 0.9 * 0.05), pytest.approx(4.0)]]
    assert bias.tolist() == [pytest.approx(0.0 - 2 * 0.9 * 0.5)]


def test_weights_of_zero_are_moved_by_the_plain_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)

    LARS([weight], lr=0.5).step()

    assert weight.tolist() == [[-0.5, -0.5], [-0.5, -0.5]]
