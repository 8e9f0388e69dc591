"""Weighted nearest neighbours by cosine similarity, in double precision.

Each of the k nearest train samples votes for its class with exp(similarity / temperature).

Source: Wu et al. 2018, arXiv:1805.01978, section 3.4, with its temperature of 0.07; so in eval_knn.py of
github.com/facebookresearch/dino (Caron et al. 2021, arXiv:2104.14294), with k of 10 and 20.

Letters: n test samples, m train samples, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jobs.errors import EvaluationError
from jobs.evaluate.encoder import Float32s
from jobs.evaluate.scores import Float64s, Int64s, ranked

NEIGHBOURS = (10, 20)
TEMPERATURE = 0.07
CHUNK_SIMILARITIES = 1 << 24
"""Similarities that are held at once; decides how many test samples are compared in one product."""
_LEAST_NORM = 1e-12


def knn_rankings(
    train: Float32s, train_labels: Int64s, test: Float32s, classes: int, neighbours: Sequence[int]
) -> list[Int64s]:
    """The best classes of each test sample, (n, RANKS), for each number of neighbours.

    Of equally near samples the one that comes first in train is taken; of classes with equal votes the one that comes
    first is better; a class without votes is no candidate.

    Args:
        train: (m, C) features.
        train_labels: (m,) in [0, K).
        test: (n, C) features.
        classes: K.
        neighbours: Each k.

    Raises:
        EvaluationError: A k is less than 1, or there are fewer train samples.
    """
    check_neighbours(neighbours, len(train))
    most = max(neighbours)
    directions, found = _directions(train).T.contiguous(), [list[Int64s]() for _ in neighbours]
    for chunk in torch.split(_directions(test), max(1, CHUNK_SIMILARITIES // len(train))):
        similarities, places = _nearest(chunk @ directions, most)
        weights, voters = np.exp(similarities / TEMPERATURE), train_labels[places]
        for rows, k in zip(found, neighbours, strict=True):
            rows.append(ranked(_votes(weights[:, :k], voters[:, :k], classes)))
    return [np.concatenate(rows) for rows in found]


def check_neighbours(neighbours: Sequence[int], train_samples: int) -> None:
    """Refuse numbers of neighbours that there are not.

    Raises:
        EvaluationError: A k is less than 1, or there are fewer train samples.
    """
    for k in neighbours:
        if not 1 <= k <= train_samples:
            remedy = "use a smaller --k, or more samples to learn from"
            raise EvaluationError("--k", f"must be from 1 to the {train_samples} train samples", k, remedy)


def _directions(features: Float32s) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(features).double(), eps=_LEAST_NORM)


def _nearest(similarities: Tensor, k: int) -> tuple[Float64s, Int64s]:
    """The k largest of each row and their places, largest first, of equal ones the first first."""
    # topk alone takes any of those that are equal.
    least = similarities.topk(k, dim=1).values[:, -1:]
    above, equal = similarities > least, similarities == least
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    places = chosen.nonzero()[:, 1].view(-1, k)
    values, order = similarities.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values.numpy(), places.gather(1, order).numpy()


def _votes(weights: Float64s, voters: Int64s, classes: int) -> Float64s:
    """(n, K), minus infinity where nobody votes."""
    rows = np.arange(len(weights))[:, None] * classes
    places = (rows + voters).ravel()
    votes: Float64s = np.bincount(places, weights.ravel(), minlength=len(weights) * classes).astype(np.float64)
    votes[np.bincount(places, minlength=len(votes)) == 0] = -np.inf
    return votes.reshape(-1, classes)
