"""LARS, with which linear probing trains its head at large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which each matrix has a rate of its own, by the norms of its weights and gradient.

    Biases and norms (one dimension) have neither that rate nor weight decay.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate.
        weight_decay: Added to the gradient of matrices, times the weights.
        momentum: Of the updates.
        trust: The coefficient of the ratio of norms.

    Source: You et al. 2017, arXiv:1708.03888, as in util/lars.py of github.com/facebookresearch/mae.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters from their gradients.

        Args:
            closure: Must be None: the loss is not computed again.
        """
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return None

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if parameter.ndim > 1:
            gradient = gradient + group["weight_decay"] * parameter
            weights, size = parameter.norm(), gradient.norm()
            ratio = group["trust"] * weights / size
            # On the device: to ask for a norm's value would wait for the kernels before.
            gradient = gradient * torch.where((weights > 0) & (size > 0), ratio, torch.ones_like(ratio))
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        update = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.sub_(group["lr"] * update)
