"""A rank is killed with the bytes of a checkpoint, or of its commit, on their way to the store."""

from __future__ import annotations

import json
import os
import signal

import psutil
import pytest
from chaos_proxy import ChaosProxy, Request
from testbed import Command, losses, small_recipe

from jobs.checkpoint.checkpoint import committed_steps
from jobs.stack.record import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FIELDS = {"epochs": 10, "max_steps": 40, "checkpoint_every_steps": 10, "base_learning_rate": 0.004}
STEP = 20


@pytest.fixture(scope="module")
def undisturbed(convmae: Command, data: str) -> list[float]:
    """Losses of an uninterrupted run."""
    convmae("pretrain", *small_recipe(data, **FIELDS), "--run", "unhurt")
    return losses(convmae.run("unhurt"))


class Assassin:
    """Kills the process that writes a certain object, while it waits for the store's answer."""

    def __init__(self, in_path: str, *, arrives: bool) -> None:
        self._in_path, self._arrives = in_path, arrives
        self.killed = ""

    def before_write(self, request: Request) -> bool:
        """As `Behaviour` wants it."""
        if self.killed or self._in_path not in request.path:
            return True
        (pid,) = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.laddr and connection.laddr.port == request.client_port and connection.pid != os.getpid()
        }
        assert pid
        self.killed = psutil.Process(pid).name()
        os.kill(pid, signal.SIGKILL)
        return self._arrives


@pytest.mark.parametrize(
    ("name", "in_path", "arrives", "resumes_at"),
    [
        ("upload", f"/checkpoints/step-{STEP:08d}/", False, STEP - 10),
        ("uploaded", f"/checkpoints/step-{STEP:08d}/", True, STEP - 10),
        ("commit", f"/commits/step-{STEP:08d}.json", False, STEP - 10),
        ("committed", f"/commits/step-{STEP:08d}.json", True, STEP),
    ],
)
def test_a_rank_is_killed_while_it_saves(
    convmae: Command,
    data: str,
    local_stack: Stack,
    undisturbed: list[float],
    name: str,
    in_path: str,
    arrives: bool,
    resumes_at: int,
) -> None:
    """A commit that arrived counts, though no process lived to see it; whatever else was under way is invisible."""
    assassin = Assassin(f"/{name}{in_path}", arrives=arrives)
    with ChaosProxy(local_stack.endpoint).running() as proxy:
        proxy.behaviour.before_write = assassin.before_write
        stack = local_stack.environment().items()
        store = {name: value for name, value in stack if name.startswith("AWS_")} | {"AWS_ENDPOINT_URL": proxy.endpoint}
        recipe = small_recipe(data, **FIELDS, run_root="s3://convmae/runs")
        convmae("pretrain", *recipe, "--run", name, **store)

    run = convmae.run(name)
    assert "RayTrainWorker" in assassin.killed
    assert losses(run) == pytest.approx(undisturbed, rel=1e-6)
    (restart,) = (event for event in run.read_events() if event["kind"] == "restart")
    assert restart["step"] == resumes_at
    assert restart["step"] + restart["steps_redone"] >= STEP
    assert committed_steps(run) == [20, 30, 40]
    checkpoints = json.loads(convmae("checkpoints", name, "--verify", "--json")[0])
    assert [row["verified"] for row in checkpoints] == [True] * 3
