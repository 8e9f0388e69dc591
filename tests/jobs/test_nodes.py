"""Nodes come and go, on a cluster of two raylets: Ray Train resizes the run, which saves first."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from testbed import Command, losses, small_recipe, wait_until

from jobs import checkpoint, stack_services
from jobs.stack import Stack

CPUS = 3
FIELDS = {
    "epochs": 400,
    "cpus_per_worker": CPUS,  # the stack's own four give one worker
    "min_workers": 1,
    "max_workers": 2,
    "resize_seconds": 2,
    "checkpoint_every_steps": 100_000,  # what is not saved for a reason is lost
}


@contextlib.contextmanager
def second_node(stack: Stack) -> Iterator[psutil.Process]:
    """Another raylet of the stack's cluster, on this machine."""
    environment = stack_services.service_environment("ray", stack.settings, os.environ)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    options = ["--block", "--node-ip-address=127.0.0.1", f"--num-cpus={CPUS}", "--object-store-memory=200000000"]
    ports = ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    command = [*ray, "start", f"--address={stack.ray_address}", *options, *ports]
    log = (stack.settings.home / "second-node.log").open("wb")
    with log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield psutil.Process(process.pid)
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                child.kill()
        process.wait()


def raylet_of(node: psutil.Process) -> psutil.Process:
    (raylet,) = (child for child in node.children(recursive=True) if child.name() == "raylet")
    return raylet


def drain(stack: Stack, raylet: psutil.Process, seconds: int) -> None:
    """What a cloud's notice of a reclaim becomes."""
    (node_id,) = (part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--node_id="))
    told = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed"]
    deadline = ["--deadline-remaining-seconds", str(seconds)]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", stack.ray_address]
    environment = {**os.environ, **stack.environment()}
    subprocess.run([*command, "--node-id", node_id, *told, *deadline], env=environment, check=True, timeout=120)


@pytest.mark.slow
def test_a_node_that_comes_costs_no_step_and_one_that_goes_with_notice_few(
    convmae: Command, data: str, local_stack: Stack
) -> None:
    arguments = small_recipe(data, **FIELDS)
    process = convmae.start("pretrain", *arguments, "--run", "nodes", RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="1")
    run = convmae.run("nodes")

    def trains(world_size: int, attempt: int) -> bool:
        now = run.read_heartbeat()
        return now.get("world_size") == world_size and now.get("attempt") == attempt and bool(now.get("gradient_norm"))

    wait_until("one worker", lambda: trains(1, 1) and run.read_heartbeat()["step"] >= 10, 180)
    with second_node(local_stack) as node:
        wait_until("two workers", lambda: trains(2, 2), 180)
        (grown,) = (event for event in run.read_events() if event["kind"] == "resize")
        wait_until("steps of two", lambda: run.read_heartbeat()["step"] >= grown["step"] + 10, 60)
        raylet = raylet_of(node)
        drain(local_stack, raylet, 30)
        wait_until("a save", lambda: checkpoint.committed_steps(run)[-1] > grown["step"], 60)
        os.kill(raylet.pid, signal.SIGKILL)
        wait_until("one worker again", lambda: trains(1, 3), 240)
    saved = checkpoint.committed_steps(run)
    convmae("stop", "nodes")
    assert process.wait(timeout=120) == 0

    events = [event for event in run.read_events() if event["kind"] not in ("checkpoint", "recovered", "consolidated")]
    assert [event["kind"] for event in events][:3] == ["start", "resize", "drain"]
    assert (grown["world_size_before"], grown["world_size"], grown["steps_redone"]) == (1, 2, 0)
    assert events[3]["step"] == saved[-1]
    found = losses(run)
    convmae("pretrain", *arguments, "max_workers=1", f"max_steps={len(found)}", "--run", "one-node")
    assert found == pytest.approx(losses(convmae.run("one-node")), rel=1e-6)
