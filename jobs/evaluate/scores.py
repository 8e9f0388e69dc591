"""Scores of a classifier on test samples: top-1, top-5, per class, confusion matrix, with confidence intervals.

Letters: n test samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.run.evaluations import method_name
from jobs.run.intervals import wilson_interval

RANKS = 5
"""Best classes of a sample that are kept."""
NO_CLASS = -1
MOST_CONFUSION_CLASSES = 2000
"""Of more classes the matrix is left out of JSON: ImageNet-21k's has 480 million places."""

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """A share of samples that were predicted right."""

    correct: int
    samples: int

    @property
    def ratio(self) -> float | None:
        """None where there are no samples."""
        return self.correct / self.samples if self.samples else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """That contains the accuracy on all such samples with 95 % confidence; None where there are no samples."""
        return wilson_interval(self.correct, self.samples) if self.samples else None

    def to_json(self) -> dict[str, Any]:
        """Accuracy, interval and counts."""
        interval = None if self.interval is None else list(self.interval)
        return {"accuracy": self.ratio, "interval": interval, "correct": self.correct, "samples": self.samples}


@dataclass(frozen=True, eq=False)
class Scores:
    """How one method classified the test samples."""

    method: str
    """`knn`, `linear`, `head` or `finetune`."""
    settings: Mapping[str, Any]
    classes: tuple[str, ...]
    labels: Int64s
    """(n,) the true classes."""
    ranking: Int64s
    """(n, RANKS) the best classes, best first; NO_CLASS where there are no more."""

    @property
    def name(self) -> str:
        """For people."""
        return method_name(self.method, self.settings)

    @property
    def top1(self) -> Accuracy:
        """How many best classes are the true ones."""
        return Accuracy(int(self._is_hit.sum()), len(self.labels))

    @property
    def top5(self) -> Accuracy | None:
        """How many true classes are among the five best; None with up to five classes, of which that says nothing."""
        if len(self.classes) <= RANKS:
            return None
        return Accuracy(int((self.ranking == self.labels[:, None]).any(1).sum()), len(self.labels))

    @property
    def per_class(self) -> list[Accuracy]:
        """Top-1 of each class."""
        counts, hits = (
            np.bincount(chosen, minlength=len(self.classes)).tolist()
            for chosen in (self.labels, self.labels[self._is_hit])
        )
        return [Accuracy(hit, count) for hit, count in zip(hits, counts, strict=True)]

    @cached_property
    def confusion(self) -> Int64s:
        """(K, K) samples by true class, in rows, and predicted class."""
        size = len(self.classes)
        return np.bincount(self.labels * size + self.ranking[:, 0], minlength=size * size).reshape(size, size)

    @cached_property
    def _is_hit(self) -> npt.NDArray[np.bool_]:
        is_hit: npt.NDArray[np.bool_] = self.ranking[:, 0] == self.labels
        return is_hit

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        rows = [{"class": name, **part.to_json()} for name, part in zip(self.classes, self.per_class, strict=True)]
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "top1": self.top1.to_json(),
            "top5": None if self.top5 is None else self.top5.to_json(),
            "per_class": rows,
            "confusion": self.confusion.tolist() if len(self.classes) <= MOST_CONFUSION_CLASSES else None,
        }


def ranked(scores: Float64s) -> Int64s:
    """The best classes of each sample, (n, RANKS); of equal ones the first in order.

    Args:
        scores: (n, K); what is minus infinity is not ranked.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :RANKS]
    best[np.isneginf(np.take_along_axis(scores, best, 1))] = NO_CLASS
    return np.pad(best, ((0, 0), (0, RANKS - best.shape[1])), constant_values=NO_CLASS)
