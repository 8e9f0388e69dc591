"""What memory checkpoints take of a cluster's nodes, for `convmae doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.checkpoint.held.holder import HOLDER_NAME, Holding
from jobs.cluster.diagnosis import Finding
from jobs.terminal import bytes_text

ANSWER_SECONDS = 10.0


def memory_findings() -> Iterator[Finding]:
    """One finding for each node and run that has a holder; one alone where there are none. Connected to the cluster."""
    import ray
    from ray.util import list_named_actors

    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}  # type: ignore[no-untyped-call]
    named = [actor for actor in list_named_actors(all_namespaces=True) if actor["name"].startswith(f"{HOLDER_NAME}:")]
    asked = []
    for actor in named:
        node_id, run_url = actor["name"].removeprefix(f"{HOLDER_NAME}:").split(":", 1)
        handle: Any = ray.get_actor(actor["name"], namespace=actor["namespace"])
        asked.append((hosts.get(node_id, node_id), run_url, handle.holding.remote()))
    for host, run_url, reply in asked:
        try:
            yield finding_of(host, ray.get(reply, timeout=ANSWER_SECONDS))
        except Exception as error:
            reason = f"the holder of {run_url} does not answer ({type(error).__name__})"
            remedy = "it ends with its run's driver; the run itself restarts from the store if it must"
            yield Finding("memory checkpoints", "warning", reason, remedy, host)
    if not asked:
        yield Finding("memory checkpoints", "ok", "none: no run holds any")


def finding_of(host: str, holding: Holding) -> Finding:
    """What a holder says of itself."""
    held = f"{bytes_text(holding.bytes)} of at most {bytes_text(holding.limit_bytes)}"
    detail = f"{held} in {holding.parts} parts of {holding.run_url} (pid {holding.pid})"
    return Finding("memory checkpoints", "ok", detail, node=host)
