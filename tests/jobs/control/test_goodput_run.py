"""What `convmae simulate` predicts is what a real run with injected kills makes of its time."""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import time

import pytest
from patience import wait_until
from testbed import Command, ranks, small_recipe

from jobs.metrics.goodput import measured_goodput
from jobs.recipe.simulation import mean_outcome
from jobs.stack.record import Stack

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 8
BETWEEN_KILLS_SECONDS = 35.0
SEED = 7


def test_predicted_and_measured_goodput_agree(convmae: Command, data: str, local_stack: Stack) -> None:
    fields = {"epochs": 300, "base_learning_rate": 4e-3, "checkpoint_every_steps": 50}
    others = {process.pid for process in ranks(local_stack)}
    convmae("submit", *small_recipe(data, **fields, max_restarts_without_progress=20), "--run", "predicted")
    run = convmae.run("predicted")
    wait_until("the first step", lambda: bool(run.read_heartbeat().get("loss")), 300)

    # As in the simulation failures come at any time, also while a group starts.
    random_, began, due = random.Random(SEED), time.monotonic(), 0.0
    for _ in range(KILLS):
        due += random_.expovariate(1 / BETWEEN_KILLS_SECONDS)
        time.sleep(max(0.0, began + due - time.monotonic()))
        wait_until("a rank", lambda: any(one.pid not in others for one in ranks(local_stack)), 120)
        victim = next(one for one in ranks(local_stack) if one.pid not in others)
        os.kill(victim.pid, signal.SIGKILL)
    wait_until("the end", lambda: run.read_heartbeat().get("state") == "finished", 600)

    found = measured_goodput(run.read_events())
    assert found
    scenario = found.scenario(
        nodes=1, min_nodes=1, mtbf_seconds=found.wall_seconds / found.restarts, replace_seconds=0.0
    )
    predicted = mean_outcome(scenario, "fixed", trials=200, seed=0)
    # The simulation begins with the start of a group, the measurement after it.
    ratio = scenario.ideal_seconds / (predicted.wall_seconds - scenario.restart_seconds)
    logger.warning("measured %s: %.3f; predicted %.3f, %s", found, found.ratio, ratio, predicted)
    assert found.restarts >= KILLS / 2
    assert ratio == pytest.approx(found.ratio, rel=0.1)


def test_an_interval_that_sets_itself_saves_by_time_and_says_why(convmae: Command, data: str) -> None:
    timed = {"checkpoint_interval": "auto", "checkpoint_every_seconds": 4.0, "checkpoint_min_seconds": 3.0}
    fields = {"epochs": 60, "checkpoint_every_steps": 100_000, "keep_checkpoints": 100, **timed}
    convmae("pretrain", *small_recipe(data, **fields, checkpoint_max_seconds=6.0), "--run", "timed")

    events = convmae.run("timed").read_events()
    decisions = [event for event in events if event["kind"] == "checkpoint-interval"]
    assert decisions[0]["reason"] == "every 4s until a checkpoint is committed"
    assert decisions[-1]["seconds"] == 6.0
    assert "a save stalls" in decisions[-1]["reason"]
    assert "checkpoint_max_seconds bounds it" in decisions[-1]["reason"]
    saves = [event["at_seconds"] - event["duration_seconds"] for event in events if event["kind"] == "checkpoint"]
    assert len(saves) > 3
    gaps = [later - earlier for earlier, later in itertools.pairwise(saves[:-1])]  # the last is the end's
    assert all(3.0 <= gap <= 9.0 for gap in gaps), gaps
