"""Nodes die, leave with notice and come; the run continues by itself, on the trajectory of an uninterrupted one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from followed_runs import PATIENCE_SECONDS, SPREAD, events, has_trained, made_dataset, trains, until
from patience import done, wait_until
from ray_nodes import Cluster, ray_cluster
from testbed import losses, small_recipe

from jobs.checkpoint.checkpoint import committed_steps, read_commit
from jobs.checkpoint.commit import Commit
from jobs.run.directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FIELDS = {**SPREAD, "standby": True}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and a node of one CPU."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add()
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a data set; then there are two nodes."""
    return made_dataset(cluster, tmp_path_factory.mktemp("photographs"), nodes=2)


def recipe_of(cluster: Cluster, data: str, **fields: object) -> Sequence[str]:
    """Arguments for a recipe that lasts longer than a test."""
    return small_recipe(data, **{**FIELDS, "run_root": f"{cluster.s3.url}/runs", **fields})


def begin(cluster: Cluster, data: str, name: str, **fields: object) -> RunDirectory:
    """Submit a run."""
    done(cluster.convmae("submit", *recipe_of(cluster, data, **fields), "--run", name))
    return cluster.run(name)


def event(run: RunDirectory, kind: str) -> dict[str, Any]:
    """The newest event of a kind."""
    return events(run, kind)[-1]


def latest_commit(run: RunDirectory) -> Commit:
    """The newest checkpoint's."""
    return read_commit(run, committed_steps(run)[-1])


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

    done(cluster.convmae("pretrain", *recipe_of(cluster, data, max_steps=len(losses(run))), "--run", "undisturbed"))
    assert losses(run) == pytest.approx(losses(cluster.run("undisturbed")), rel=1e-5)


def test_the_store_is_killed_and_away_for_twenty_seconds(cluster: Cluster, data: str) -> None:
    fields = {"max_steps": 800, "checkpoint_every_steps": 5}
    run = begin(cluster, data, "storeless", **fields)
    until(run, "a checkpoint", lambda now: now.get("checkpoint_step", 0) >= 10)

    cluster.s3.kill()
    time.sleep(20)
    cluster.s3.start()
    back_at = run.read_heartbeat()["step"]

    until(run, "the end", lambda now: now["state"] == "finished")
    assert 10 <= back_at < 800, "it was away while the run went on"
    assert run.read_heartbeat()["attempt"] == 1
    assert committed_steps(run)[-1] == 800
    done(cluster.convmae("pretrain", *recipe_of(cluster, data, **fields), "--run", "with-a-store"))
    assert losses(run) == pytest.approx(losses(cluster.run("with-a-store")), rel=1e-5)


def test_with_fewer_nodes_than_the_minimum_a_run_waits_and_goes_on_when_they_come(cluster: Cluster, data: str) -> None:
    for node in [node for node in cluster.nodes if node.is_up][1:]:
        node.kill()
    wait_until("one node", lambda: len(cluster.alive()) == 2, PATIENCE_SECONDS)

    run = begin(cluster, data, "waiting", min_workers=2)
    until(run, "a word that it waits", lambda now: now["state"] == "waiting")
    assert event(run, "waiting")["reason"] == "there is room for 1 workers, and min_workers is 2; waits for nodes"
    second = cluster.add()
    begun = until(run, "two ranks and a checkpoint", trains(2, after=15))

    second.kill()
    until(run, "a word that it waits again", lambda now: now["state"] == "waiting")
    cluster.add()
    until(run, "two ranks again", lambda now: trains(2)(now) and now["attempt"] > begun["attempt"])
    cluster.nodes[-1].kill()
    until(run, "a word that it waits once more", lambda now: now["state"] == "waiting")
    out, _ = done(cluster.convmae("stop", run.url))
    assert "stopped" in out, "also where no rank is there that could save"


def test_sigterm_saves_and_says_how_to_resume(cluster: Cluster, data: str) -> None:
    process = cluster.convmae("pretrain", *recipe_of(cluster, data), "--run", "terminated")
    run = cluster.run("terminated")
    until(run, "steps", trains(1, after=12))

    process.send_signal(signal.SIGTERM)

    out, _ = done(process)
    assert "terminated: stopped; the same command resumes it from its checkpoint" in out
    stopped = event(run, "stopped")
    assert stopped["reason"] == "SIGTERM"
    assert latest_commit(run).step == stopped["step"] == len(losses(run))


def test_the_ray_head_dies_and_the_same_command_goes_on(cluster: Cluster, data: str) -> None:
    run = begin(cluster, data, "headless")
    until(run, "a checkpoint", trains(1, after=15))
    before = latest_commit(run).step

    for node in [cluster.head, *cluster.nodes]:
        node.end()
    cluster.start_head()
    cluster.add()
    begin(cluster, data, "headless")

    has_trained(run, 2, after=before)
    assert event(run, "restart")["reason"] == "resumed by a new driver"
    assert event(run, "restart")["step"] >= before
    done(cluster.convmae("stop", run.url))
    assert len(losses(run)) == run.read_heartbeat()["step"]
