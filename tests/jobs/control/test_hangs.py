"""A worker that is stopped is found, named, and replaced, without a person."""

from __future__ import annotations

import os
import signal

import pytest
from patience import wait_until
from testbed import Command, losses, ranks, small_recipe

from jobs.stack.record import Stack

FIELDS = {"epochs": 20, "checkpoint_every_steps": 10, "min_workers": 2, "max_workers": 2}
LIMIT_SECONDS = 15


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stopped_worker_is_found_within_its_limit_and_the_run_goes_on(
    convmae: Command, data: str, local_stack: Stack
) -> None:
    convmae("pretrain", *small_recipe(data, **FIELDS), "--run", "moving")
    before = {process.pid for process in ranks(local_stack)}
    convmae("submit", *small_recipe(data, hang_seconds=LIMIT_SECONDS, **FIELDS), "--run", "hanging")
    run = convmae.run("hanging")
    wait_until("step 15", lambda: run.read_heartbeat().get("step", 0) >= 15, 240)
    worker = next(process for process in ranks(local_stack) if process.pid not in before)

    os.kill(worker.pid, signal.SIGSTOP)
    wait_until("the end", lambda: run.read_heartbeat().get("state") == "finished", 240)

    assert losses(run) == pytest.approx(losses(convmae.run("moving")), rel=1e-6)
    events = run.read_events()
    (hang,) = (event for event in events if event["kind"] == "hang")
    assert hang["pid"] == worker.pid
    assert LIMIT_SECONDS < hang["seconds"] < LIMIT_SECONDS + 10
    assert hang["state"].startswith("stopped (T)")
    assert "jobs/rank/trainer.py" in hang["stack"]
    (restart,) = (event for event in events if event["kind"] == "restart")
    assert restart["reason"] == hang["reason"]
    assert f"rank {hang['rank']} on " in convmae("logs", "hanging")[0]
