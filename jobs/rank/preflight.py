"""The check of all nodes of a worker group before its ranks connect. Imports Ray: import it late."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from jobs.errors import PreflightError
from jobs.health.interface import Evaluator, Evict, HealthState, NodeContext, NodeHealth, ProbeResult
from jobs.health.links import LINK_SPEED, Address, receive_once, sent_bytes_per_second, speed_of_nodes
from jobs.health.node_probes import checked
from jobs.health.preflight import PreflightEvaluator
from jobs.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

PREFLIGHT_SECONDS = 30.0
"""For a check that takes a fraction of one; a node that hangs does not finish."""


@dataclass(frozen=True)
class RankNode:
    """Where a rank's process is."""

    node_id: str
    host: str
    address: str
    """Of the node, by which the others reach it."""


@dataclass(frozen=True)
class Preflight:
    """What is checked, and who is to know of nodes that fail."""

    monitor: Any
    """Handle of the run's monitor."""
    folders: Sequence[Path]
    """To which ranks write on their nodes' own disks, besides the temporary one."""
    on_gpu: bool
    evaluator: Evaluator = field(default_factory=PreflightEvaluator)
    """Says which nodes are left out."""

    @classmethod
    def of(cls, recipe: Recipe, monitor: Any) -> Preflight | None:
        """As the recipe says; None: nothing is checked."""
        folders = (Path(recipe.cache_dir),) if recipe.cache_dir else ()
        return cls(monitor, folders, recipe.device == "cuda") if recipe.preflight else None

    def check(self, group: Any, places: Sequence[RankNode]) -> None:
        """Check every rank's node, and report those that fail.

        Args:
            group: Ray Train's worker group.
            places: Of its ranks.

        Raises:
            PreflightError: Some must be left out; names them.
        """
        began = time.monotonic()
        found = self._checked(group, places)
        links = self._links(group, places)
        nodes = [
            NodeHealth(place.node_id, place.host, found[rank] | links.get(rank, {}))
            for rank, place in enumerate(places)
        ]
        failed = {
            node_id: decision.reason
            for decision in self.evaluator.evaluate(HealthState(nodes=nodes))
            if isinstance(decision, Evict)
            for node_id in decision.target_nodes
        }
        logger.info("the nodes of %d ranks were checked in %.2f s", len(places), time.monotonic() - began)
        if failed:
            ray.get(self.monitor.preflight_failed.remote(failed))
            raise PreflightError("; ".join(failed.values()))

    def _checked(self, group: Any, places: Sequence[RankNode]) -> list[dict[str, ProbeResult]]:
        replies = [
            group.execute_single_async(rank, check_here, self.folders, self.on_gpu) for rank in range(len(places))
        ]
        done, _ = ray.wait(replies, num_returns=len(replies), timeout=PREFLIGHT_SECONDS)
        return [_result_of(reply, is_done=reply in done) for reply in replies]

    def _links(self, group: Any, places: Sequence[RankNode]) -> dict[int, dict[str, ProbeResult]]:
        """Speed of the link of each node, under its first rank; nothing where there is one node, or a rank fails."""
        first: dict[str, int] = {}
        for rank, place in enumerate(places):
            first.setdefault(place.node_id, rank)
        ring = list(first)
        if len(ring) < 2:
            return {}
        try:
            waiting = [
                group.execute_single_async(first[node], receive_once, places[first[node]].address) for node in ring
            ]
            addresses: list[Address] = ray.get(waiting, timeout=PREFLIGHT_SECONDS)
            sending = [
                group.execute_single_async(first[node], sent_bytes_per_second, addresses[(place + 1) % len(ring)])
                for place, node in enumerate(ring)
            ]
            sent: list[float] = ray.get(sending, timeout=PREFLIGHT_SECONDS)
        except RayError:
            logger.warning("the links between nodes could not be measured", exc_info=True)
            return {}
        speeds = speed_of_nodes(ring, dict(zip(ring, sent, strict=True)))
        return {first[node]: {"link": ProbeResult({LINK_SPEED: speed})} for node, speed in speeds.items()}


def _result_of(reply: Any, *, is_done: bool) -> dict[str, ProbeResult]:
    if not is_done:
        return {"answer": ProbeResult(passed=False, detail=f"it did not finish within {PREFLIGHT_SECONDS:g} s")}
    try:
        results: dict[str, ProbeResult] = ray.get(reply)
    except RayError as error:
        return {"answer": ProbeResult(passed=False, detail=str(error).strip().splitlines()[-1])}
    return results


def check_here(folders: Sequence[Path], on_gpu: bool) -> dict[str, ProbeResult]:
    """Check the node of this process, which is a rank's."""
    import ray.train.torch

    device = str(ray.train.torch.get_device()) if on_gpu else "cpu"
    return checked(NodeContext(device, (Path(tempfile.gettempdir()), *folders)))
