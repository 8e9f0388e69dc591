"""Runs on a cluster of several nodes, as tests follow them: their recipe, their progress, and their events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from patience import done, wait_until
from ray_nodes import Cluster
from testbed import TILES

from jobs.run.directory import RunDirectory
from pipeline.ingest.photographs import cut_tiles

PATIENCE_SECONDS = 300
SPREAD: dict[str, object] = {
    "device": "cpu",
    "precision": "fp32",
    "cpus_per_worker": 1.0,
    "loader_threads": 1,
    "checkpoint_every_steps": 10,
    "resize_seconds": 2.0,
    "min_workers": 1,
    "max_workers": 3,
    "epochs": 1000,
    "base_learning_rate": 0.004,
    "max_restarts_without_progress": 5,
}
"""Fields of a small recipe that lasts longer than a test, with a rank on each node of one CPU."""


def made_dataset(cluster: Cluster, folder: Path, nodes: int = 1) -> str:
    """Shard real photographs on a cluster of one node, into its store; returns the URL of the dataset.

    Args:
        cluster: Does it.
        folder: Empty; takes the photographs.
        nodes: That the cluster has when it is done. Those of one machine unpack our code into one folder, and Ray lets
            one begin to work while another has unpacked a part of it: so they come after the first has.
    """
    cut_tiles(folder, TILES, seed=0)
    url = f"{cluster.s3.url}/data"
    done(cluster.convmae("shard", str(folder), url, "--samples-per-shard", "40"))
    for _ in range(nodes - 1):
        cluster.add()
    return url


def until(
    run: RunDirectory, what: str, holds: Callable[[dict[str, Any]], bool], seconds: float = PATIENCE_SECONDS
) -> dict[str, Any]:
    """Wait for a heartbeat that fulfils a condition; returns it.

    Raises:
        AssertionError: It does not in time; quotes the heartbeat and the newest events.
    """
    seen: dict[str, Any] = {}

    def look() -> bool:
        seen.clear()
        seen.update(run.read_heartbeat())
        return bool(seen) and holds(seen)

    try:
        wait_until(what, look, seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{seen}\n" + "\n".join(map(str, run.read_events()[-10:]))) from None
    return seen


def trains(workers: int, after: int = 0) -> Callable[[dict[str, Any]], bool]:
    """Whether that many ranks train, past a step."""
    return lambda now: (
        now["state"] == "running" and now.get("world_size") == workers and bool(now.get("loss")) and now["step"] > after
    )


def has_trained(run: RunDirectory, attempt: int, after: int = 0) -> dict[str, Any]:
    """Wait until an attempt has trained past a step itself: its first heartbeat repeats the previous attempt's loss."""

    def holds(now: dict[str, Any]) -> bool:
        if now.get("attempt", 0) < attempt or not now.get("loss") or now["step"] <= after:
            return False
        return attempt == 1 or any(event["attempt"] >= attempt for event in events(run, "recovered"))

    return until(run, f"a step past {after} of attempt {attempt}", holds)


def has_checkpoint(now: dict[str, Any]) -> bool:
    """Whether one was committed."""
    return (now.get("checkpoint_step") or 0) > 0


def continues(run: RunDirectory, workers: int, steps: int = 20) -> dict[str, Any]:
    """Wait until that many ranks have trained that many more steps; returns the heartbeat."""
    return until(run, f"{steps} steps of {workers} ranks", trains(workers, after=run.read_heartbeat()["step"] + steps))


def events(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    """The events of a kind."""
    return [event for event in run.read_events() if event["kind"] == kind]
