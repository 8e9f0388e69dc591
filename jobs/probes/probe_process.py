"""The process of a probe. Imports nothing heavy: it lowers its priority before it does."""

from __future__ import annotations

import os
from typing import Any

from jobs.probes.run_probe import ProbedData, ProbedWeights, probed
from pipeline.host.idle_cpu import take_idle_cpu
from pipeline.store.storage import Storage

MOST_THREADS = 4
CORES_A_THREAD = 8
"""So that a probe takes an eighth of a node's memory bandwidth at most, whatever its priority."""


class ProbeProcess:
    """Probes weights with the CPU time that nothing else on the node wants. Ray makes an actor of it."""

    def __init__(self, *, is_idle: bool) -> None:
        """Lower the priority of this thread and of all that it will start, if there is training to be slowed."""
        if is_idle:
            take_idle_cpu()

    def probe(self, storage: Storage, data: ProbedData, weights: ProbedWeights) -> dict[str, Any]:
        """As `probed`."""
        cores = len(os.sched_getaffinity(0))
        return probed(storage, data, weights, threads=max(1, min(MOST_THREADS, cores // CORES_A_THREAD)))
