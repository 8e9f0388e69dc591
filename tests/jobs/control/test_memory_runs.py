"""Runs that lose ranks, nodes and pairs of nodes, and resume from what other nodes hold in memory."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest
from followed_runs import SPREAD, events, has_trained, made_dataset, trains, until
from patience import done, wait_until
from ray_nodes import Cluster, Node, ray_cluster
from testbed import small_recipe

from jobs.checkpoint.checkpoint import committed_steps
from jobs.run.directory import RunDirectory
from jobs.run.trace import differences, read_trace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EVERY = 4
STEPS = 1000
"""With which runs are compared; they are ended sooner, on the machines that this was tried on."""
FIELDS = {
    **SPREAD, "standby": True, "memory_checkpoint_every_steps": EVERY, "checkpoint_every_steps": 100_000,
    "digest_every_steps": 1, "max_restarts_without_progress": 2,
}  # fmt: skip
NODES = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and a node of one CPU."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add()
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a data set; then there are NODES nodes."""
    return made_dataset(cluster, tmp_path_factory.mktemp("photographs"), NODES)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, data: str) -> Mapping[int, tuple[float, str]]:
    """Loss and digest by step of a run that nothing happens to, on one rank."""
    fields = {**FIELDS, "max_workers": 1, "max_steps": STEPS, "memory_checkpoint_every_steps": 0}
    fields |= {"run_root": f"{cluster.s3.url}/runs"}
    trace = ("--trace", f"{cluster.s3.url}/traces/undisturbed")
    done(cluster.convmae("pretrain", *small_recipe(data, **fields), "--run", "undisturbed", *trace))
    return trajectory(cluster.run("undisturbed"))


def trajectory(run: RunDirectory) -> dict[int, tuple[float, str]]:
    return {row["step"]: (row["loss"], row["digest"]) for row in run.read_history() if "digest" in row}


def assert_equal(found: Mapping[int, tuple[float, str]], undisturbed: Mapping[int, tuple[float, str]]) -> None:
    """Loss and digest of each step up to STEPS, to the bit."""
    compared = {step: values for step, values in found.items() if step <= STEPS}
    assert list(compared) == list(range(1, len(compared) + 1))
    assert len(compared) > 30
    assert compared == {step: undisturbed[step] for step in compared}


def assert_same_trace(run: RunDirectory, steps: int) -> None:
    """What was consumed at each of so many steps, up to STEPS."""
    traces = run.url.replace(f"/runs/{run.name}", "/traces")

    def first(name: str) -> Iterator[dict[str, Any]]:
        rows = read_trace(run.storage, f"{traces}/{name}")
        return itertools.takewhile(lambda row: row["step"] <= min(steps, STEPS), rows)

    assert list(differences(first(run.name), first("undisturbed"))) == []


def begin(cluster: Cluster, data: str, name: str, **fields: object) -> RunDirectory:
    recipe = small_recipe(data, **{**FIELDS, "run_root": f"{cluster.s3.url}/runs", **fields})
    done(cluster.convmae("submit", *recipe, "--run", name, "--trace", f"{cluster.s3.url}/traces/{name}"))
    return cluster.run(name)


def held(run: RunDirectory, after: int) -> dict[str, Any]:
    """Wait until a state of more steps is held in memory."""
    return until(run, "a memory checkpoint", lambda now: (now.get("memory_checkpoint_step") or 0) > after)


def restarted(run: RunDirectory, attempt: int) -> dict[str, Any]:
    """The event by which an attempt began, once it trains."""
    has_trained(run, attempt)
    return next(event for event in run.read_events() if event["attempt"] == attempt and "steps_redone" in event)


def holders(node: Node) -> list[psutil.Process]:
    family = psutil.Process(node.process.pid).children(recursive=True)
    return [process for process in family if "MemoryHolder" in process.name()]


def alive(cluster: Cluster) -> list[Node]:
    return [node for node in cluster.nodes if node.workers()]


def test_a_rank_a_node_and_a_pair_of_nodes_are_lost(
    cluster: Cluster, data: str, undisturbed: Mapping[int, tuple[float, str]]
) -> None:
    run = begin(cluster, data, "lossy")
    until(run, "three ranks", trains(NODES))
    step = held(run, after=0)["memory_checkpoint_step"]
    assert all(len(holders(node)) == 1 for node in alive(cluster))

    alive(cluster)[0].workers()[0].kill()
    restart = restarted(run, 2)
    assert (restart["restored_from"], restart["world_size"]) == ("memory", NODES)
    assert restart["step"] >= step
    assert restart["steps_redone"] <= 2 * EVERY  # those of the interval, and of the time until the state was held

    step = held(run, after=restart["step"])["memory_checkpoint_step"]
    alive(cluster)[1].kill()
    restart = restarted(run, 3)
    assert (restart["restored_from"], restart["world_size"]) == ("memory", NODES - 1)
    assert restart["step"] >= step
    assert restart["steps_redone"] <= 2 * EVERY

    cluster.add()
    until(run, "three ranks again", trains(NODES))
    resize = events(run, "resize")[-1]
    assert (resize["restored_from"], resize["steps_redone"]) == ("memory", 0)
    stored = committed_steps(run)[-1]  # by the resize
    held(run, after=resize["step"] + 2 * EVERY)
    for node in alive(cluster)[:2]:
        node.kill()
    restart = restarted(run, events(run, "resize")[-1]["attempt"] + 1)
    assert (restart["restored_from"], restart["step"]) == ("store", stored)
    (lost,) = events(run, "memory-checkpoint-lost")
    assert "it is missing" in lost["reason"]

    done(cluster.convmae("stop", run.url))
    assert restart["step"] < STEPS
    found = trajectory(run)
    assert_equal(found, undisturbed)
    assert_same_trace(run, len(found))
    left = alive(cluster) + [node for node in cluster.nodes if node.is_up]
    wait_until("the holders to end with the run", lambda: not any(map(holders, left)), 60)


def test_what_changes_in_memory_is_found_and_the_doctor_counts_it(
    cluster: Cluster, data: str, undisturbed: Mapping[int, tuple[float, str]]
) -> None:
    while len([node for node in cluster.nodes if node.is_up]) < 2:
        cluster.add()
    run = begin(cluster, data, "flipped")
    until(run, "two ranks", trains(2))
    held(run, after=4 * EVERY)
    out, _ = done(cluster.convmae("doctor", "--json"))
    found = [finding for finding in json.loads(out) if finding["check"] == "memory checkpoints"]
    assert len(found) == 2
    assert all(run.url in finding["detail"] for finding in found)

    rank = alive(cluster)[0].workers()[0]
    rank.send_signal(signal.SIGSTOP)  # nothing is held anew
    time.sleep(1.0)
    for process in holders(alive(cluster)[0]):
        flip(process, "convmae-checkpoint")
    rank.kill()
    restart = restarted(run, 2)

    assert restart["restored_from"] == "memory", "the other node had a copy"
    done(cluster.convmae("stop", run.url))
    assert restart["step"] < STEPS
    trained = trajectory(run)
    assert_equal(trained, undisturbed)
    assert_same_trace(run, len(trained))


def flip(process: psutil.Process, name: str) -> None:
    """Flip a bit in all that a process maps of files of this name."""
    for place in process.memory_maps(grouped=False):
        if name in place.path:
            address = "-".join(f"{int(side, 16):x}" for side in place.addr.split("-"))
            handle = os.open(f"/proc/{process.pid}/map_files/{address}", os.O_RDWR)
            byte = os.pread(handle, 1, 50_000)
            os.pwrite(handle, bytes([byte[0] ^ 16]), 50_000)
            os.close(handle)


def test_killed_holders_cost_a_memory_checkpoint_and_no_step(cluster: Cluster, data: str) -> None:
    run = begin(cluster, data, "without-holders")
    until(run, "two ranks", trains(2))
    step = held(run, after=0)["memory_checkpoint_step"]
    for node in alive(cluster):
        for process in holders(node):
            process.kill()

    held(run, after=step + 4 * EVERY)

    assert run.read_heartbeat()["attempt"] == 1
    assert len(events(run, "memory-checkpoint-failed")) <= 2
    done(cluster.convmae("stop", run.url))
