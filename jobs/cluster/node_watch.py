"""Which nodes of the Ray cluster answer, and a watch that ends a worker group when a node with its ranks falls silent.

Ray notices late: a host that loses its power or its network resets no connection, so Ray asks five times and waits for
each answer, a minute in all, and the other ranks would wait in their collective for half an hour.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jobs.cluster.ray_internals.core import RANK_CLASS, draining_nodes, end_actors, living_actors

logger = logging.getLogger(__name__)

PROBE_SECONDS = 1.0
PROBES_AT_ONCE = 64
LOOK_SECONDS = 1.0
LONGEST_LOOK_SECONDS = 2.0
"""What one look counts at most, so that an overloaded machine does not judge a node by a single one."""
SILENT_SECONDS = 5.5
"""A link cut for three seconds, plus the second that a look may take, is not yet a loss."""
ALONE_SECONDS = 20.0
"""If no other node answers, it is most likely this one that is cut off; longer than a switch takes to restart."""
CALL_SECONDS = 5.0


@dataclass
class Silence:
    """The judgement of which nodes are lost. Pure: the clock is an argument.

    Silence counts against a node only while some other node answers; else it is this one that is cut off.
    """

    own_node: str
    alone_seconds: float = 0.0
    """How long no other node has answered."""
    _seconds: dict[str, float] = field(default_factory=dict)
    _looked_at: float | None = None

    def look(self, answered: Mapping[str, bool], now: float) -> dict[str, float]:
        """Note which nodes answer.

        Args:
            answered: Whether it answered, by node id, for all nodes that Ray believes to be alive.
            now: Monotonic seconds.

        Returns:
            The nodes that are lost, and for how many seconds each has been silent.
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


def unusable_nodes() -> set[str]:
    """Ids of nodes that Ray counts as alive, though they are being drained or do not answer."""
    import ray

    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    return draining_nodes() | silent_nodes(nodes)


def raylet_addresses() -> dict[str, tuple[str, int]]:
    """Host and port of the raylet of every living node, by the node's id."""
    import ray

    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: _address(node) for node in nodes if node["Alive"]}


def silent_nodes(nodes: Iterable[Mapping[str, Any]]) -> set[str]:
    """Ids of the nodes whose raylet accepts no connection; Ray's own health check needs many seconds to find out.

    Args:
        nodes: As `ray.nodes()` lists them.
    """
    return {node for node, answers in answering_nodes(nodes).items() if not answers}


def answering_nodes(nodes: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether the raylet of each living node accepts a connection, by node id. Blocks for PROBE_SECONDS at most.

    A busy raylet answers all the same, since its host accepts connections for it.

    Args:
        nodes: As `ray.nodes()` lists them.
    """
    alive = [node for node in nodes if node["Alive"]]
    with ThreadPoolExecutor(PROBES_AT_ONCE) as probes:
        answers = list(probes.map(_answers, alive))
    return {node["NodeID"]: answered for node, answered in zip(alive, answers, strict=True)}


def _address(node: Mapping[str, Any]) -> tuple[str, int]:
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection(_address(node), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


class NodeWatch:
    """A thread of the driver that looks at the cluster's nodes every second while its context is open.

    Owns: the thread. Failure: an error in a look is logged, and the next look follows. Blocking: leaving the context,
    until the current look has ended.
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
        if time.monotonic() - looked_at > CALL_SECONDS:  # the head itself was silent: what was seen is out of date
            return
        if alone and self._silence.own_node in ranks.values():  # these could continue to train by themselves
            lost = {node: self._silence.alone_seconds for node in answered if node != self._silence.own_node}
        gone = {node: seconds for node, seconds in lost.items() if node in ranks.values()}
        if not gone:
            return
        known = {node["NodeID"]: f"{node['NodeManagerHostname']}, {node['NodeManagerAddress']}" for node in nodes}
        hosts = {node: known[node] for node in gone}
        logger.error("nodes have been silent for %.1f s, and their group ends: %s", min(gone.values()), hosts)
        ray.get(self._monitor.unreachable.remote(hosts, min(gone.values())), timeout=CALL_SECONDS)
        # All of them: ranks on other nodes hang in a collective, and would be waited for.
        end_actors(self._gcs_address, sorted(ranks, key=lambda rank: ranks[rank] not in gone))
