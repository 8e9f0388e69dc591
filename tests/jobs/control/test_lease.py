from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.control import driver, lease
from jobs.control.lease import claim_run, is_live, sole_driver
from jobs.control.run_plan import RunPlan
from jobs.errors import OvertakenError, RunError, RunFailedError
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.schedule import Schedule
from jobs.run.directory import FINAL_STATES, RunDirectory
from pipeline.errors import LeaseHeldError
from pipeline.store.storage import Storage

PROGRESS = {"step": 0, "total_steps": 40}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPlan:
    monkeypatch.setattr(lease, "FLUSH_INTERVAL_SECONDS", 0.4)
    recipe = named_recipe("tiny")
    schedule = Schedule.of(recipe, steps_per_epoch=1)
    return RunPlan(recipe, RunDirectory.of(Storage(), str(tmp_path), "first"), schedule)


@pytest.fixture
def live(plan: RunPlan) -> Iterator[None]:
    """Another driver, whose heartbeat moves."""
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.05):
            beats += 1
            plan.run.write_heartbeat({"state": "running", "updated_at_seconds": float(beats), **PROGRESS})

    thread = threading.Thread(target=beat)
    plan.run.write_heartbeat({"state": "running", "updated_at_seconds": 0.0, **PROGRESS})
    thread.start()
    yield
    ended.set()
    thread.join()


def write_commit(run: RunDirectory, step: int) -> None:
    commit = Commit(
        step=step, epoch=0, world_size=1, zero_stage=1, precision="fp32", recipe_digest="", dataset_digest="",
        order_version=1, seed=0, attempt=1, created_at_seconds=0.0, milestone=False, counters={}, versions={}, files=(),
    )  # fmt: skip
    checkpoint.write_commit(run, commit)


def test_a_run_whose_heartbeat_moves_is_live(plan: RunPlan, live: None) -> None:
    assert is_live(plan.run)


def test_a_run_that_never_spoke_or_was_cut_off_is_not_live(plan: RunPlan) -> None:
    assert not is_live(plan.run)
    plan.run.write_heartbeat({"state": "running", "updated_at_seconds": 1.0, **PROGRESS})
    assert not is_live(plan.run)


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_a_run_that_ended_is_known_at_once_not_to_be_live(
    plan: RunPlan, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.control.lease.time.sleep", None)
    plan.run.write_heartbeat({"state": state, "updated_at_seconds": 1.0, **PROGRESS})

    assert not is_live(plan.run)


def test_a_name_is_new_then_resumes(plan: RunPlan) -> None:
    assert claim_run(plan) == "new"
    assert claim_run(plan) == "resumes"
    plan.run.write_heartbeat({"state": "failed", "updated_at_seconds": 1.0, **PROGRESS})
    assert claim_run(plan) == "resumes"


def test_a_live_run_is_not_claimed_twice(plan: RunPlan, live: None) -> None:
    plan.run.claim(plan.recipe)
    plan.run.write_stop_request()
    other = dataclasses.replace(plan, recipe=plan.recipe.amended({"loader_threads": 7}))

    with pytest.raises(RunError, match="must not be running already") as caught:
        claim_run(other)
    assert "convmae stop first" in caught.value.remedy
    assert plan.run.read_recipe() == plan.recipe
    assert plan.run.take_stop_request(), "the live run has not heard it yet"


def test_a_second_driver_is_told_who_drives_and_how_old_the_lease_is(plan: RunPlan) -> None:
    watched: list[str] = []
    with sole_driver(plan.run, watched.append, beat_seconds=0.1) as claim:
        with pytest.raises(RunError) as refused, sole_driver(plan.run, watched.append):
            pass
        assert claim.number == 1

    assert f"process {os.getpid()}, drives the run, since" in str(refused.value)
    assert re.search(r"the lease is \d+ s old", str(refused.value))
    assert "convmae stop first" in refused.value.remedy
    with sole_driver(plan.run, watched.append) as claim:
        assert claim.number == 2, "numbers rise over the life of a run, so that they tell whose commit is newer"


def test_who_submits_a_live_run_is_told_who_drives_it(plan: RunPlan, live: None) -> None:
    plan.run.claim(plan.recipe)
    with (
        sole_driver(plan.run, lambda _: None),
        pytest.raises(RunError, match=rf"already \(.*process {os.getpid()}, drives the run.*the lease is"),
    ):
        claim_run(plan)


class LostClaim:
    """A claim that another driver has taken over."""

    def check(self) -> None:
        raise LeaseHeldError("destination", "was taken over by somebody", "claims", "wait")


def test_a_driver_that_lost_its_lease_ends_and_writes_nothing_more(plan: RunPlan) -> None:
    calls: list[str] = []

    class Monitor:
        def __getattr__(self, name: str) -> object:
            calls.append(name)
            raise AssertionError(name)

    released = threading.Event()
    monitor = Monitor()

    def fit() -> None:
        released.wait(30)

    def kill(actor: object) -> None:
        calls.append("kill" if actor is monitor else "?")

    with pytest.raises(OvertakenError, match="run: was taken over by somebody, got 'first'"):
        driver.drive(plan, LostClaim(), monitor, fit, lambda status: None, kill=kill)  # type: ignore[arg-type]
    released.set()

    assert calls == ["kill"]


@pytest.mark.parametrize("is_overtaken", [True, False])
def test_a_driver_whose_monitor_another_one_has_ended_asks_the_store_why(plan: RunPlan, is_overtaken: bool) -> None:
    """The other has ended the monitor, and with it the ranks, before this one reaches the store again."""

    class Method:
        @staticmethod
        def remote(*_: object) -> None:
            raise RayActorError

    class Monitor:
        status = end = Method

    def fit() -> None:
        raise ValueError("no monitor")

    with sole_driver(plan.run, lambda _: None) as claim:
        if is_overtaken:
            other = plan.run.path(f"{checkpoint.CLAIMS}/claim-000002.json")
            plan.run.storage.write(
                other, plan.run.storage.read(other.replace("2.json", "1.json")).replace(b"drives", b"rules")
            )
        error = OvertakenError if is_overtaken else RunFailedError
        with pytest.raises(error, match="was taken over by .*, rules the run" if is_overtaken else "no monitor"):
            driver.drive(plan, claim, Monitor(), fit, lambda status: None)


def test_a_newest_commit_that_cannot_be_read_does_not_keep_a_run_from_resuming(plan: RunPlan) -> None:
    plan.run.claim(plan.recipe)
    write_commit(plan.run, 1)
    plan.run.storage.write(checkpoint.commit_url(plan.run, 1), b"{")

    assert claim_run(plan) == "resumes"


def test_another_recipe_cannot_take_the_name(plan: RunPlan) -> None:
    claim_run(plan)
    other = dataclasses.replace(plan, recipe=plan.recipe.amended({"seed": 1}))

    with pytest.raises(RunError, match="seed: 0 -> 1"):
        claim_run(other)


def test_a_finished_run_is_finished_until_it_shall_train_longer(plan: RunPlan) -> None:
    plan.run.claim(plan.recipe)
    plan.run.write_heartbeat({"state": "finished", "updated_at_seconds": 1.0, **PROGRESS})
    write_commit(plan.run, plan.schedule.total_steps)
    assert claim_run(plan) == "resumes"  # the driver died before the report
    plan.run.storage.write(plan.run.path("report.html"), b"report")

    assert claim_run(plan) == "finished"
    longer = dataclasses.replace(plan.schedule, total_steps=plan.schedule.total_steps + 1)
    assert claim_run(dataclasses.replace(plan, schedule=longer)) == "resumes"


def test_a_finished_run_whose_checkpoints_were_deleted_resumes(plan: RunPlan) -> None:
    plan.run.claim(plan.recipe)
    plan.run.write_heartbeat({"state": "finished", "updated_at_seconds": 1.0, **PROGRESS})

    assert claim_run(plan) == "resumes"


def test_a_stop_request_that_nobody_heard_does_not_stop_the_next_attempt(plan: RunPlan) -> None:
    plan.run.claim(plan.recipe)
    plan.run.write_stop_request()

    claim_run(plan)

    assert not plan.run.take_stop_request()
