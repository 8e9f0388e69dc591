"""The holders of a run's memory checkpoints, one on each node with ranks. Imports Ray Train: import it late."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.checkpoint.held.held_checkpoint import find_holder
from jobs.checkpoint.held.holder import MemoryHolder, holder_name
from jobs.cluster.ray_internals.train import WorkerGroupCallback
from jobs.run.directory import RunDirectory


class MemoryHolders(WorkerGroupCallback):
    """Starts a holder on each node before its ranks train.

    Owns: the holders. They belong to Ray Train's controller, and so end with the run, with its driver, or with their
    nodes; the monitor ends those of nodes that the run has left, once there is a newer memory checkpoint. One whose
    process dies is started again by Ray, with nothing in it.
    """

    def __init__(self, run: RunDirectory) -> None:
        """Start none yet.

        Args:
            run: Whose recipe says whether there are any.
        """
        self._run = run
        self._holders: dict[str, Any] = {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Start those that are missing. Does not wait for them: what is asked of them waits."""
        if not self._run.read_recipe_fields().get("memory_checkpoint_every_steps", "auto"):
            return
        for node in {worker.metadata.node_id for worker in worker_group.get_workers()}:
            name = holder_name(self._run.url, node)
            if node in self._holders and _exists(name):
                continue  # the first handle is kept: with it the actor would go
            actor: Any = ray.remote(MemoryHolder)
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"name": name, "num_cpus": 0, "max_restarts": -1, "scheduling_strategy": there}
            self._holders[node] = actor.options(**options).remote(self._run.url)


def _exists(name: str) -> bool:
    try:
        find_holder(name)
    except ValueError:  # it was ended when the run left the node
        return False
    return True
