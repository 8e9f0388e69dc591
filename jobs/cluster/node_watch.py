"""Notices that a node with ranks has fallen silent, long before Ray does, and ends their group.

A host that loses its power or its network resets no connection: Ray asks five times and waits for each answer, a minute
in all, and the other ranks would wait in their collective for half an hour.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.cluster.node_view import answering_nodes
from jobs.cluster.ray_internals.core import RANK_CLASS, end_actors, living_actors

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
LONGEST_LOOK_SECONDS = 2.0
"""What one look counts for at most, so that a machine that is short of time judges nobody by a single one."""
SILENT_SECONDS = 5.5
"""A link that is cut for three seconds, and the second that a look may take, are not yet a loss."""
ALONE_SECONDS = 20.0
"""While no other node answers it is most likely this one that is cut off: longer than a switch takes to restart."""
CALL_SECONDS = 5.0


@dataclass
class Silence:
    """Judges which nodes are lost. Pure: the clock is an argument.

    Only what is seen while some other node answers counts against a node; else it is the judge who is cut off.
    """

    own_node: str
    alone_seconds: float = 0.0
    """Since when no other node has answered."""
    _seconds: dict[str, float] = field(default_factory=dict)
    _looked_at: float | None = None

    def look(self, answered: Mapping[str, bool], now: float) -> dict[str, float]:
        """Note which nodes answer.

        Args:
            answered: By node id, all those that Ray believes to be alive.
            now: Monotonic seconds.

        Returns:
            Those that are lost, and for how many seconds they have been silent.
        """
        spent = 0.0 if self._looked_at is None else min(now - self._looked_at, LONGEST_LOOK_SECONDS)
        self._looked_at = now
        others = {node: answers for node, answers in answered.items() if node != self.own_node}
        heard = any(others.values())
        self.alone_seconds = 0.0 if heard or not others else self.alone_seconds + spent
        before = self._seconds
        counted = spent if heard else 0.0
        self._seconds = {node: before.get(node, 0.0) + counted for node, answers in others.items() if not answers}
        return {node: seconds for node, seconds in self._seconds.items() if seconds >= SILENT_SECONDS}


class NodeWatch:
    """A thread of the driver that looks at the cluster's nodes each second while its context is open.

    Owns: the thread. Failure: what goes wrong in a look is logged, and the next one follows. Blocking: leaving the
    context, until the look that is under way has ended.
    """

    def __init__(self, monitor: Any) -> None:
        import ray

        context = ray.get_runtime_context()
        self._monitor = monitor
        self._silence = Silence(context.get_node_id())
        self._job_id: str = context.get_job_id()
        self._gcs_address: str = context.gcs_address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="convmae-nodes", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join(2 * CALL_SECONDS)

    def _watch(self) -> None:
        next_at = time.monotonic()
        while not self._ended.wait(max(0.0, next_at - time.monotonic())):
            next_at = time.monotonic() + LOOK_SECONDS
            try:
                self._look()
            except Exception:
                logger.warning("the nodes could not be looked at; trying again", exc_info=True)

    def _look(self) -> None:
        import ray

        nodes: Any = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        answered = answering_nodes(nodes)
        looked_at = time.monotonic()
        lost = self._silence.look(answered, looked_at)
        alone = self._silence.alone_seconds >= ALONE_SECONDS
        if not lost and not alone:
            return
        ranks = living_actors(RANK_CLASS, self._job_id)
        if time.monotonic() - looked_at > CALL_SECONDS:  # the head itself was silent: what was seen is no longer so
            return
        if alone and self._silence.own_node in ranks.values():  # these could train on by themselves
            lost = {node: self._silence.alone_seconds for node in answered if node != self._silence.own_node}
        gone = {node: seconds for node, seconds in lost.items() if node in ranks.values()}
        if not gone:
            return
        known = {node["NodeID"]: f"{node['NodeManagerHostname']}, {node['NodeManagerAddress']}" for node in nodes}
        hosts = {node: known[node] for node in gone}
        logger.error("nodes have been silent for %.1f s, and their group ends: %s", min(gone.values()), hosts)
        ray.get(self._monitor.unreachable.remote(hosts, min(gone.values())), timeout=CALL_SECONDS)
        # All of them: those on other nodes hang in a collective, and would be waited for.
        end_actors(self._gcs_address, sorted(ranks, key=lambda rank: ranks[rank] not in gone))
