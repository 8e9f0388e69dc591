"""The words of Ray Train's coming health interface, as far as they are used here.

Names and meanings are those of "Ray Train Monitoring and Diagnostics" (ray-project/enhancements, pull request 71),
which Ray 2.60 does not have yet: probes collect, evaluators decide. What is ours becomes children of Ray's classes once
these exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from jobs.metrics.rank_figures import FigureTable


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """By name with a unit."""
    passed: bool | None = None
    """None where there is nothing to pass: figures that are judged beside those of others."""
    detail: str = ""
    """For people, in one line."""


@dataclass(frozen=True)
class NodeContext:
    """Where a probe of a node works."""

    device: str
    """That a rank would train on: `cpu`, `cuda:0` ..."""
    folders: Sequence[Path]
    """On the node's own disks, to which a rank would write."""


class NodeProbe(Protocol):
    """A check of one node, without the others."""

    name: str

    def poll(self, context: NodeContext) -> ProbeResult:
        """Check it; whatever is raised means that the check failed."""


class WorkerProbe(Protocol):
    """What one rank's process measures of itself, at every step."""

    name: str

    def poll(self) -> ProbeResult:
        """What was measured last."""


@dataclass(frozen=True)
class NodeHealth:
    """What the probes of one node found."""

    node_id: str
    host: str
    probe_results: Mapping[str, ProbeResult]
    """By the probe's name."""


@dataclass(frozen=True)
class HealthState:
    """What an evaluator judges: a step as all ranks reported it, or all nodes before a start."""

    reported: FigureTable | None = None
    """The figures of each rank, in the order of ranks."""
    nodes: Sequence[NodeHealth] = ()


class Cause(Enum):
    """Which part of the world a decision blames."""

    HARDWARE = auto()
    NO_PROGRESS = auto()
    """A straggler, whatever slows it."""


@dataclass(frozen=True)
class HealthDecision:
    """What is to be done, and why."""

    cause: Cause
    reason: str
    """For people, in one line."""


@dataclass(frozen=True)
class Diagnose(HealthDecision):
    """Ranks that somebody should look at."""

    target_ranks: Sequence[int]


@dataclass(frozen=True)
class Evict(HealthDecision):
    """Nodes on which the next group should not start."""

    target_nodes: Sequence[str]


class Evaluator(Protocol):
    """A judge that remembers what it has seen."""

    def evaluate(self, state: HealthState) -> Sequence[HealthDecision]:
        """What follows from the newest state; nothing where all is well."""
