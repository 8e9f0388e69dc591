"""Which nodes of the Ray cluster a worker group can be started on now; Ray itself learns late that one is gone."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs.cluster.ray_internals.core import draining_nodes

PROBE_SECONDS = 1.0
PROBES_AT_ONCE = 64


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
    """Ids of the nodes whose raylet takes no connection; Ray's own health check needs many seconds to say so.

    Args:
        nodes: As `ray.nodes()` tells of them.
    """
    return {node for node, answers in answering_nodes(nodes).items() if not answers}


def answering_nodes(nodes: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether the raylet of each living node takes a connection, by the node's id. Blocks for PROBE_SECONDS at most.

    A raylet that has no time answers all the same, since its host does so for it.

    Args:
        nodes: As `ray.nodes()` tells of them.
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
