"""Room on the cluster: whether one more run fits beside those that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.recipe.recipe import Recipe

_SLACK = 1e-6
"""Of sums of fractions of a core."""


@dataclass(frozen=True)
class Resources:
    """Cores and GPUs."""

    cpus: float
    gpus: float

    @classmethod
    def of(cls, recipe: Recipe, workers: float | None = None) -> Resources:
        """What a run's workers reserve; None: its `max_workers`."""
        count = recipe.max_workers if workers is None else workers
        return cls(count * recipe.cpus_per_worker, count if recipe.device == "cuda" else 0.0)

    @classmethod
    def named(cls, resources: Mapping[str, float]) -> Resources:
        """As Ray names them."""
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0))

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpus - other.cpus, self.gpus - other.gpus)

    def holds(self, other: Resources) -> bool:
        """Whether the other is at most this."""
        return other.cpus <= self.cpus + _SLACK and other.gpus <= self.gpus + _SLACK


NOTHING = Resources(0.0, 0.0)


@dataclass(frozen=True)
class Seen:
    """The cluster at one moment."""

    offered: Resources
    """By all nodes, in use or not."""
    available: Resources
    """What nobody has reserved."""


@dataclass(frozen=True)
class Occupant:
    """A run of ours that is on the cluster, or on its way there."""

    recipe: Recipe
    workers: float
    """That it has now; 0 while it starts."""


def has_room(recipe: Recipe, seen: Seen, ours: Iterable[Occupant]) -> bool:
    """Whether a run gets all its workers at once.

    What others have is what is reserved and not by our workers. Of ours all that they may grow to counts, so that a
    run which is only just starting is not overlooked.

    Args:
        recipe: Of the run.
        seen: The cluster.
        ours: Runs that were submitted and have not ended.
    """
    runs = list(ours)
    reserved = sum((Resources.of(run.recipe, run.workers) for run in runs), NOTHING)
    others = seen.offered - seen.available - reserved
    others = Resources(max(0.0, others.cpus), max(0.0, others.gpus))
    wanted = sum((Resources.of(run.recipe) for run in runs), Resources.of(recipe))
    return (seen.offered - others).holds(wanted)


def seen_now() -> Seen:
    """The cluster to which this process is connected."""
    import ray

    connection: Any = ray
    return Seen(Resources.named(connection.cluster_resources()), Resources.named(connection.available_resources()))
