"""Events of a run whose encoder was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEPS_PER_EPOCH = 4
TESTED = 200


def probe_event(step: int, accuracy: float, plan: str = "a plan") -> dict[str, Any]:
    """One; kNN with k of 10 is two points worse, the linear probe two points better."""
    place = {"at_seconds": 1000.0 + step, "attempt": 1, "kind": "probe", "step": step, "epoch": step // STEPS_PER_EPOCH}
    accuracies = {"knn_10": accuracy - 0.02, "knn_20": accuracy, "linear": accuracy + 0.02}
    counts = {"tested": TESTED, "learned": 4 * TESTED, "classes": 4}
    return {**place, **accuracies, **counts, "plan": plan, "duration_seconds": 2.5}


def probe_events(accuracies: Mapping[int, float], plan: str = "a plan") -> list[dict[str, Any]]:
    """Those of several steps."""
    return [probe_event(step, accuracy, plan) for step, accuracy in accuracies.items()]
