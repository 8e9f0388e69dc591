"""Nodes die, leave with notice and come; the run goes on by itself, on the trajectory of one that was left alone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until
from ray_nodes import Cluster, ray_cluster
from testbed import TILES, losses, small_recipe

from jobs.run_directory import RunDirectory
from pipeline.photographs import cut_tiles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PATIENCE_SECONDS = 240
FIELDS = {
    "device": "cpu",
    "precision": "fp32",
    "cpus_per_worker": 1.0,
    "loader_threads": 1,
    "checkpoint_every_steps": 10,
    "resize_seconds": 2.0,
    "min_workers": 1,
    "max_workers": 3,
    "epochs": 60,
    "max_restarts_without_progress": 5,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and two nodes of one CPU."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add()
        cluster.add()
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a data set."""
    folder: Path = tmp_path_factory.mktemp("photographs")
    cut_tiles(folder, TILES, seed=0)
    url = f"{cluster.bucket}/data"
    done(cluster.convmae("shard", str(folder), url, "--samples-per-shard", "40"))
    return url


def done(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, f"{process.args} ended with {process.returncode}\n{out}\n{err}"
    return out, err


def begin(cluster: Cluster, data: str, name: str, **fields: object) -> RunDirectory:
    """Submit a run."""
    recipe = small_recipe(data, **{**FIELDS, "run_root": f"{cluster.bucket}/runs", **fields})
    done(cluster.convmae("submit", *recipe, "--run", name))
    return cluster.run(name)


def until(run: RunDirectory, what: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait for what the heartbeat tells; returns it."""
    seen: dict[str, Any] = {}

    def look() -> bool:
        seen.clear()
        seen.update(run.read_heartbeat())
        return bool(seen) and holds(seen)

    wait_until(what, look, PATIENCE_SECONDS)
    return seen


def trains(workers: int, after: int = 0) -> Callable[[dict[str, Any]], bool]:
    """Whether so many ranks are past a step."""
    return lambda now: (
        now["state"] == "running" and now.get("world_size") == workers and bool(now.get("loss")) and now["step"] > after
    )


def event(run: RunDirectory, kind: str) -> dict[str, Any]:
    """The newest event of a kind."""
    return next(event for event in reversed(run.read_events()) if event["kind"] == kind)


def test_a_run_lives_through_nodes_that_come_and_go(cluster: Cluster, data: str) -> None:
    run = begin(cluster, data, "nodes")
    second = cluster.nodes[1]
    begun = until(run, "two ranks", trains(2))["step"]

    third = cluster.add()
    until(run, "three ranks", trains(3, after=begun))
    grown = event(run, "resize")
    assert (grown["world_size_before"], grown["world_size"], grown["steps_redone"]) == (2, 3, 0)

    now = until(run, "a checkpoint", lambda now: now["step"] > grown["step"] + 15)
    second.kill()
    until(run, "two ranks again", lambda seen: trains(2, after=now["step"])(seen) and seen["attempt"] > now["attempt"])
    restart = event(run, "restart")
    assert (restart["world_size_before"], restart["world_size"]) == (3, 2)
    assert restart["steps_redone"] <= 2 * int(str(FIELDS["checkpoint_every_steps"]))

    attempt = run.read_heartbeat()["attempt"]
    cluster.drain(third, 20)
    until(run, "one rank", lambda seen: trains(1)(seen) and seen["attempt"] > attempt)
    assert "goes away in" in event(run, "drain")["reason"]
    assert event(run, "resize")["steps_redone"] == 0

    done(cluster.convmae("stop", run.url))
    assert run.read_heartbeat()["state"] == "stopped"
    assert losses(run)
