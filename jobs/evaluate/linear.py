"""A linear probe: multinomial logistic regression on standardised features, in double precision.

Minimises the sum of cross-entropies plus `l2` / 2 times the squared weights, biases apart: a convex function, so that
the result depends on the features alone, not on a schedule or a seed. It is what scikit-learn's LogisticRegression
minimises with C = 1 / `l2` behind a StandardScaler; PyTorch is on every node, scikit-learn is not. Standardisation is
the batch norm without affine part that the linear probing of MAE and ConvMAE puts before its head
(main_linprobe.py of github.com/Alpha-VL/ConvMAE), with the mean and deviation of all train samples.

Letters: n samples, C channels, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jobs.errors import EvaluationError
from jobs.evaluate.encoder import Float32s
from jobs.evaluate.scores import Int64s, ranked

L2 = 1.0
MOST_ITERATIONS = 2000
LEAST_GRADIENT = 1e-7
"""In coordinates of about the same curvature; the objective, in double precision, resolves a few times less."""
_LEAST_DEVIATION = 1e-8
"""Relative to the mean; what varies less is rounding of a constant."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted probe."""

    mean: Tensor
    """(C,)."""
    deviation: Tensor
    """(C,); 1 where a feature is constant."""
    weight: Tensor
    """(K, C)."""
    bias: Tensor
    """(K,)."""
    iterations: int
    has_converged: bool
    """Whether the minimum was reached; else MOST_ITERATIONS were not enough."""

    def ranking(self, features: Float32s) -> Int64s:
        """The best classes of each sample, (n, RANKS)."""
        standardised = (torch.from_numpy(features).double() - self.mean) / self.deviation
        return ranked(functional.linear(standardised, self.weight, self.bias).numpy())


def check_l2(l2: float) -> None:
    """Refuse a weight without which separable classes have no minimum.

    Raises:
        EvaluationError: It is not a positive number.
    """
    if not (math.isfinite(l2) and l2 > 0):
        raise EvaluationError("--l2", "must be a positive number", l2, "use 1, as scikit-learn's C = 1")


def fitted_probe(features: Float32s, labels: Int64s, classes: int, l2: float = L2) -> LinearProbe:
    """Fit a probe by L-BFGS from zero.

    Args:
        features: (n, C).
        labels: (n,) in [0, K).
        classes: K.
        l2: Weight of the squared weights.

    Raises:
        EvaluationError: As `check_l2`.
    """
    check_l2(l2)
    given, truth = torch.from_numpy(features).double(), torch.from_numpy(labels)
    deviation, mean = torch.std_mean(given, dim=0, correction=0)
    deviation[deviation <= _LEAST_DEVIATION * mean.abs()] = 1
    inputs, back = _evened((given - mean) / deviation, classes, l2 / len(given))
    decay = l2 / (2 * len(given)) * back.square().sum(0)
    weight = torch.zeros(classes, given.shape[1], device="cpu", dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, device="cpu", dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MOST_ITERATIONS,
        max_eval=2 * MOST_ITERATIONS,
        tolerance_grad=LEAST_GRADIENT,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = functional.cross_entropy(functional.linear(inputs, weight, bias), truth)
        loss = loss + (decay * weight.square()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(objective)  # type: ignore[no-untyped-call]
    objective()
    gradient = max(part.grad.abs().max().item() for part in (weight, bias) if part.grad is not None)
    iterations = int(solver.state[weight]["n_iter"])
    found = weight.detach() @ back.T
    return LinearProbe(mean, deviation, found, bias.detach(), iterations, gradient <= LEAST_GRADIENT)


def _evened(inputs: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Inputs in coordinates in which the objective curves about the same in all directions.

    Features are nearly collinear, and L-BFGS would take thousands of iterations. At weights of zero the curvature is
    (1 - 1/K) / K times the covariance of the inputs, plus the decay; its eigenvectors are the new directions.

    Args:
        inputs: (n, C) of mean zero.
        classes: K.
        decay: Of the squared weights, for the mean over samples.

    Returns:
        inputs: (n, C) in the new coordinates.
        back: (C, C) whose transpose turns weights there into those of the old ones; columns are orthogonal.
    """
    curvatures, directions = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    back = directions / ((1 - 1 / classes) / classes * curvatures.clamp(min=0) + decay).sqrt()
    return inputs @ back, back
