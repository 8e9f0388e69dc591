"""SGD with momentum, and LARS, over flat vectors as ZeRO keeps them: the same bits wherever a vector is cut.

State has AdamW's names, which is what checkpoints know: the momentum is `exp_avg`, and `exp_avg_sq` stays zero. Only
linear heads are trained with it, so that costs little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.step.exact_gradients import norm_of, norm_words

MOMENTUM = 0.9
TRUST = 0.001
"""Coefficient of the ratio of norms (You et al. 2017, arXiv:1708.03888), as util/lars.py of MAE has it."""


class FlatMomentum(torch.optim.Optimizer):
    """Each group is one parameter. One that has `trusted_elements` is a matrix of so many, with LARS's own rate."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "trusted_elements": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every vector that has a gradient. Collective where there are matrices."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad + parameter * group["weight_decay"]
                if group["trusted_elements"]:
                    gradient *= _trust(parameter, gradient, group["trusted_elements"])
                slots = self._slots(parameter)
                slots["step"] += 1
                slots["exp_avg"].mul_(MOMENTUM).add_(gradient)
                parameter.sub_(slots["exp_avg"] * group["lr"])

    def _slots(self, parameter: Tensor) -> dict[str, Tensor]:
        slots: dict[str, Tensor] = self.state[parameter]
        if not slots:
            slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            slots["exp_avg"], slots["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return slots


def _trust(parameter: Tensor, gradient: Tensor, elements: int) -> float:
    weights, size = (_norm(values, elements) for values in (parameter, gradient))
    return TRUST * weights / size if weights > 0 and size > 0 else 1.0


def _norm(values: Tensor, elements: int) -> float:
    words = norm_words([values], elements, rank=dist.get_rank())
    dist.all_reduce(words)
    return norm_of(words.tolist(), elements)
