"""The process of a probe. Imports nothing heavy: it lowers its priority before it does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.probes.run_probe import ProbedData, ProbedWeights, probed
from pipeline.host.idle_cpu import take_idle_cpu
from pipeline.store.storage import Storage

MOST_THREADS = 4
CORES_A_THREAD = 8
"""So that a probe takes an eighth of a node's memory bandwidth at most, whatever its priority."""

PAUSE_SECONDS = 0.5
"""Between two looks at whether it may work again."""


@dataclass(frozen=True)
class Allowance:
    """How much CPU time a run's probes may take by now; more comes with the time."""

    node_share: float
    """Of the CPU time of all cores of the node."""
    trained_seconds: float
    """For how long the run has trained."""
    used_seconds: float
    """CPU time of processes before this one."""


class Pace:
    """Holds a process's work up as long as it has used more CPU time than it is allowed.

    So a probe now and then runs at once, by what has been saved since the one before, and of many the last ones wait
    for the end of the training.
    """

    def __init__(
        self,
        allowance: Allowance,
        cores: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.process_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Begin with what is allowed now.

        Args:
            allowance: Of this moment.
            cores: Of the node.
            clock: Monotonic seconds.
            used: CPU seconds of this process.
            sleep: Waits.
        """
        self._allowance, self._cores = allowance, cores
        self._clock, self._used, self._sleep = clock, used, sleep
        self._began = clock()

    def wait(self) -> None:
        """Return when the process may work."""
        while self._used() > self._allowed():
            self._sleep(PAUSE_SECONDS)

    def _allowed(self) -> float:
        trained = self._allowance.trained_seconds + self._clock() - self._began
        return self._allowance.node_share * self._cores * trained - self._allowance.used_seconds


class ProbeProcess:
    """Probes weights with the CPU time that nothing else on the node wants. Ray makes an actor of it."""

    def __init__(self, *, is_idle: bool) -> None:
        """Lower the priority of this thread and of all that it will start, if there is training to be slowed."""
        if is_idle:
            take_idle_cpu()

    def probe(
        self, storage: Storage, data: ProbedData, weights: ProbedWeights, allowance: Allowance | None
    ) -> tuple[dict[str, Any], float]:
        """As `probed`; and the CPU seconds that this process has used so far.

        Args:
            storage: Reaches all.
            data: What is learned from and tested on.
            weights: What is probed.
            allowance: Of CPU time; None where nothing trains that would be slowed.
        """
        cores = len(os.sched_getaffinity(0))
        pace = Pace(allowance, cores).wait if allowance else lambda: None
        threads = max(1, min(MOST_THREADS, cores // CORES_A_THREAD))
        return probed(storage, data, weights, threads=threads, pace=pace), time.process_time()
