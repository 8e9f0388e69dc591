"""AdamW whose every value follows from that value alone, wherever a vector is cut.

PyTorch's fused AdamW on a CPU rounds the values that do not fill a vector register otherwise than the others, and which
these are depends on the world size. Here they are moved to registers of their own, filled up with zeros. The unfused
one is elementwise by itself, and takes nine times as long (docs/decisions/0045-same-bits.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_WIDTH = 64
"""Values that fill whole registers on every CPU: those of AVX-512 hold 16."""


class ElementwiseAdamW(torch.optim.AdamW):
    """AdamW over flat vectors, as ZeRO keeps them, with the fused kernels."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every vector that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                slots = self._slots(parameter)
                count, vectors = slots["step"], [parameter.data, parameter.grad, slots["exp_avg"], slots["exp_avg_sq"]]
                whole = len(parameter) - len(parameter) % _WIDTH
                if whole < len(parameter):
                    rest = [vector[whole:] for vector in vectors]
                    filled = [torch.cat([part, part.new_zeros(_WIDTH - len(part))]) for part in rest]
                    _update(filled, count.clone(), group)
                    torch._foreach_copy_(rest, [part[: len(parameter) - whole] for part in filled])
                _update([vector[:whole] for vector in vectors], count, group)

    def _slots(self, parameter: Tensor) -> dict[str, Tensor]:
        slots: dict[str, Tensor] = self.state[parameter]
        if not slots:
            slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            slots["exp_avg"], slots["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return slots


def _update(vectors: Sequence[Tensor], count: Tensor, group: Mapping[str, Any]) -> None:
    """One update of a parameter's values by their gradients, both moments, and the count of updates, all in place."""
    beta1, beta2 = group["betas"]
    parameter, gradient, average, square = vectors
    adamw(
        [parameter],
        [gradient],
        [average],
        [square],
        [],
        [count],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
