"""What dies is brought back without a person, and the run's trajectory is that of one that was left alone."""

from __future__ import annotations

import os
import signal

import pytest
from followed_runs import has_trained
from patience import wait_until
from prometheus_server import asked
from testbed import Command, family, losses, processes, ranks, small_recipe

from jobs.stack.record import Stack

FIELDS = {
    "epochs": 12,
    "checkpoint_every_steps": 24,
    "memory_checkpoint_every_steps": 2,
    "max_restarts_without_progress": 5,
    "standby": True,
}

TRACES = "s3://convmae/traces/"


@pytest.fixture(scope="module")
def undisturbed(convmae: Command, data: str) -> list[float]:
    """Losses of an uninterrupted run."""
    convmae("pretrain", *small_recipe(data, **FIELDS), "--run", "undisturbed", "--trace", TRACES + "undisturbed")
    return losses(convmae.run("undisturbed"))


def waiting(stack: Stack) -> set[int]:
    """Processes that have no work, and have imported what a rank needs."""
    return {
        process.pid
        for process in processes("ray::IDLE", family(stack))
        if any("libtorch_cpu" in mapped.path for mapped in process.memory_maps())
    }


@pytest.fixture
def ranks_before(local_stack: Stack) -> set[int]:
    """Ranks of other runs, which a test must not kill."""
    return {process.pid for process in ranks(local_stack)}


def test_worker_driver_and_s3_server_are_killed_and_the_run_goes_on_by_itself(
    convmae: Command, data: str, local_stack: Stack, undisturbed: list[float], ranks_before: set[int]
) -> None:
    convmae("submit", *small_recipe(data, **FIELDS), "--run", "killed", "--trace", TRACES + "killed")
    run = convmae.run("killed")

    has_trained(run, 1, after=15)
    wait_until("a process that waits", lambda: len(waiting(local_stack)) >= 2, 60)
    standbys = waiting(local_stack)
    worker = next(process for process in ranks(local_stack) if process.pid not in ranks_before)
    os.kill(worker.pid, signal.SIGKILL)
    has_trained(run, 2, after=35)
    workers = {process.pid for process in ranks(local_stack)} - ranks_before
    assert workers <= standbys, "those that waited took over"
    (driver,) = (process for process in processes(run.url, family(local_stack)) if "jobs.cli.main" in process.cmdline())
    os.kill(driver.pid, signal.SIGKILL)
    has_trained(run, 3, after=55)
    stack = Stack.load(local_stack.settings.home)
    assert stack is not None
    s3 = stack.status()["s3"].pid
    assert s3
    os.kill(s3, signal.SIGKILL)
    wait_until("the end", lambda: run.read_heartbeat().get("state") == "finished", 300)

    assert losses(run) == pytest.approx(undisturbed, rel=1e-6)
    assert convmae("trace", TRACES + "undisturbed", TRACES + "killed")[0] == "the traces agree\n"
    starts = [event for event in run.read_events() if event["kind"] in ("start", "restart")]
    assert [event["attempt"] for event in starts] == [1, 2, 3]
    assert "rank" in starts[1]["reason"]
    assert starts[2]["reason"] == "resumed by a new driver"
    assert [event["kind"] for event in run.read_events() if event["kind"].startswith("memory")] == []
    # From memory, unless the newest commit is of a later step than the newest memory checkpoint.
    assert [event["restored_from"] for event in starts] in (["", "memory", "store"], ["", "store", "store"])
    assert starts[1]["steps_redone"] <= 3 * FIELDS["memory_checkpoint_every_steps"]
    recovered = [event for event in run.read_events() if event["kind"] == "recovered"]
    assert [event["attempt"] for event in recovered] == [2, 3]
    assert all(0 < event["start_seconds"] < event["down_seconds"] < 120 for event in recovered)
    assert all(event["steps_redone"] <= 2 * FIELDS["checkpoint_every_steps"] for event in starts)
    if local_stack.prometheus_url:
        assert_series_go_on(local_stack.prometheus_url, "killed")


def assert_series_go_on(url: str, run: str) -> None:
    """One line for each run on a graph, and rates over its restarts, whichever driver served it."""
    kept = asked(url, f'count_over_time(convmae_step{{run="{run}"}}[15m])')
    assert [series["metric"]["instance"] for series in kept] == [run]
    assert not asked(url, f'resets(convmae_images_total{{run="{run}"}}[15m]) > 0')
    (total,) = asked(url, f'last_over_time(convmae_restarts_total{{run="{run}", reason="restart"}}[15m])')
    assert float(total["value"][1]) == 2


@pytest.mark.slow
def test_a_run_that_cannot_work_is_given_up_with_its_cause(convmae: Command, data: str) -> None:
    """A learning rate at which the loss is soon not finite: each restart fails at the same step."""
    fields = {"epochs": 5, "base_learning_rate": 1e30, "warmup_epochs": 0.0, "max_restarts_without_progress": 1}
    arguments = small_recipe(data, checkpoint_every_steps=1000, **fields)

    _, err = convmae("pretrain", *arguments, "--run", "exploding", code=1)

    failure = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failure) == 1
    assert "2 failures without a new checkpoint" in failure[0]
    assert "NonFiniteLossError" in failure[0]
    assert "Traceback" not in failure[0]
    run = convmae.run("exploding")
    assert run.read_events()[-1]["kind"] == "failed"
    assert "NonFiniteLossError" in run.read_events()[-1]["reason"]
