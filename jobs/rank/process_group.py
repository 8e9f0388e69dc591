"""The process group of a worker group's ranks, as Ray Train starts it. Imports Ray: import it late."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util import get_node_ip_address

from jobs.cluster.interfaces import choose_interface
from jobs.cluster.ray_internals.train import (
    TorchBackend,
    TorchConfig,
    WorkerGroupStartupFailedError,
    shutdown_torch,
)
from jobs.errors import PreflightError
from jobs.rank.gpu import check_untouched
from jobs.rank.preflight import Preflight, RankNode
from jobs.rank.watchdog import COMPILE_ALLOWED_SECONDS, SAVE_ALLOWED_SECONDS
from jobs.recipe.recipe import Recipe

LEAVE_SECONDS = 2.0
MARGIN_SECONDS = 120
"""By which a collective outlasts what a rank may take for its slowest work."""


@dataclass
class RanksOverNodes(TorchConfig):
    """Ray Train's configuration, for ranks on hosts whose interfaces have any names."""

    preflight: Preflight | None = None
    """How nodes are checked before ranks start; None: not at all."""

    @classmethod
    def of(cls, recipe: Recipe, preflight: Preflight | None = None) -> RanksOverNodes:
        """With time for a collective as the recipe allows: the run's own watch, which names who hangs, comes first."""
        allowed = (recipe.hang_seconds, recipe.stall_seconds, SAVE_ALLOWED_SECONDS)
        compiling = COMPILE_ALLOWED_SECONDS if recipe.compile else 0.0
        return cls(timeout_s=int(max(*allowed, compiling) + MARGIN_SECONDS), preflight=preflight)

    @property
    def backend_cls(self) -> type[RanksBackend]:
        """What Ray Train makes of it."""
        return RanksBackend


class RanksBackend(TorchBackend):
    """Ray Train's backend, with nodes checked, and the interface chosen on each, before the ranks connect."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Connect the ranks. Blocks until they have found each other.

        Raises:
            WorkerGroupStartupFailedError: They did not, or a node failed its check. Ray Train tries again after this
                one and no other.
        """
        try:
            places = worker_group.execute(make_ready)
            if backend_config.preflight:
                backend_config.preflight.check(worker_group, places)
            super().on_start(worker_group, backend_config)
        except (RayTaskError, PreflightError) as error:
            raise WorkerGroupStartupFailedError("the ranks could not be connected") from error

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        """Leave the process group. A rank that hangs is not waited for: its process ends next."""
        left = worker_group.execute_async(shutdown_torch, destroy_process_group=len(worker_group) > 1)
        ray.wait(left, num_returns=len(left), timeout=LEAVE_SECONDS)


def make_ready() -> RankNode:
    """Check the GPU and choose the interface of this process; returns where it is. Runs in a rank."""
    check_untouched()
    address = get_node_ip_address()  # type: ignore[no-untyped-call]
    choose_interface(address, os.environ)
    return RankNode(ray.get_runtime_context().get_node_id(), socket.gethostname(), address)
