"""What is concluded from the checks of all nodes before ranks start: which of them to leave out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jobs.health.interface import Cause, Evict, HealthState, NodeHealth
from jobs.health.links import LINK_SPEED
from jobs.health.node_probes import PRODUCT_SPEED
from jobs.health.stragglers import medians_of_others

SLOW_FACTOR = 4.0
"""By which a speed must be below the median of the others: no two GPUs that are well differ as much."""
FAST_ENOUGH: Mapping[str, float] = {PRODUCT_SPEED: np.inf, LINK_SPEED: 100e6}
"""Speeds that are judged beside those of others, and from where on they are not: a loopback's vary with the load."""
LEAST_JUDGED = 3
"""Of two that differ nobody knows which is the slow one."""


class PreflightEvaluator:
    """The judge of nodes that have been checked; an `Evaluator`. Remembers nothing."""

    def evaluate(self, state: HealthState) -> Sequence[Evict]:
        """One decision for each node that must not be used; names what it failed."""
        faults: dict[str, list[str]] = {}
        for node, fault in (*_failures(state.nodes), *_slow(state.nodes)):
            known = faults.setdefault(node.node_id, [])
            if (text := f"{node.host}: {fault}") not in known:
                known.append(text)
        return [Evict(Cause.HARDWARE, "; ".join(texts), (node_id,)) for node_id, texts in faults.items()]


def _failures(nodes: Sequence[NodeHealth]) -> Iterator[tuple[NodeHealth, str]]:
    for node in nodes:
        for name, result in node.probe_results.items():
            if result.passed is False:
                yield node, f"the check of its {name} failed: {result.detail}"


def _slow(nodes: Sequence[NodeHealth]) -> Iterator[tuple[NodeHealth, str]]:
    """Several ranks of a node, which have a GPU each, are judged one by one."""
    for speed, enough in FAST_ENOUGH.items():
        found = [
            (node, result.metrics[speed])
            for node in nodes
            for result in node.probe_results.values()
            if speed in result.metrics
        ]
        if len(found) < LEAST_JUDGED:
            continue
        values = np.array([value for _, value in found])
        for (node, value), median in zip(found, medians_of_others(values).tolist(), strict=True):
            if value < enough and SLOW_FACTOR * value < median:
                yield node, f"{speed} is {value:.3g}, of the others {median:.3g}"
