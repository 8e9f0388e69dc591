"""What becomes of what ranks report to the monitor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from monitored_runs import (
    EVERY_TEN,
    RANKS,
    READING,
    FakeClock,
    Start,
    begin,
    commit,
    last_event,
    record,
    scraped,
)

from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.checkpoint.held.held_checkpoint import HeldCheckpoint
from jobs.run.directory import RunDirectory


def bad(sample: int, step: int) -> dict[str, Any]:
    told = {"fault": "checksum", "url": "s3://b/shard-000000.tar", "reason": "flipped"}
    return {"id": sample, "step": step, "substitute": sample + 1, **told}


def test_a_new_run_starts_with_attempt_one(start: Start, run: RunDirectory) -> None:
    monitor = start()
    assert monitor.status()["state"] == "starting"

    assert begin(monitor) == 1

    event = last_event(run)
    assert (event["kind"], event["reason"], event["attempt"]) == ("start", "new run", 1)
    assert (event["step"], event["world_size"], event["steps_redone"]) == (0, 2, 0)
    assert run.read_heartbeat()["state"] == "running"
    assert run.read_heartbeat()["restarts"] == 0


def test_a_failure_is_a_restart_that_quotes_it_and_counts_redone_steps(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 31))
    assert monitor.worker_failed("rank 1: lost", remedy="restart") == ""
    assert monitor.status()["state"] == "restarting"

    assert begin(monitor, world_size=1, resume_step=20) == 2

    event = last_event(run)
    assert (event["kind"], event["reason"]) == ("restart", "rank 1: lost")
    assert (event["step"], event["steps_redone"]) == (20, 10)
    assert (event["world_size_before"], event["world_size"]) == (2, 1)
    assert monitor.status()["restarts"] == 1


def test_a_new_group_without_a_failure_is_a_resize_also_after_an_earlier_failure(
    start: Start, run: RunDirectory
) -> None:
    monitor = start()
    begin(monitor)
    monitor.worker_failed("rank 1: lost", remedy="restart")
    begin(monitor, world_size=1)

    begin(monitor, world_size=2)

    kinds = [(event["kind"], event["reason"]) for event in run.read_events()]
    assert kinds == [("start", "new run"), ("restart", "rank 1: lost"), ("resize", "workers 1 -> 2")]


def test_a_new_driver_numbers_attempts_on(start: Start, run: RunDirectory) -> None:
    first = start()
    begin(first)
    record(first, range(1, 31))
    first.flush()

    assert begin(start(), resume_step=20) == 2

    event = last_event(run)
    assert (event["kind"], event["reason"], event["steps_redone"]) == ("restart", "resumed by a new driver", 10)
    assert [event["attempt"] for event in run.read_events()] == [1, 2]


def test_with_seconds_the_ranks_save_when_it_is_time(start: Start, clock: FakeClock) -> None:
    monitor = start(monotonic=clock, interval=replace(EVERY_TEN, kind="seconds"))
    begin(monitor)
    series = scraped(monitor)
    assert series["convmae_checkpoint_interval_seconds"] == 60
    assert "convmae_checkpoint_interval_steps" not in series

    instructions = []
    for step in range(1, 10):
        instructions.append(record(monitor, range(step, step + 1)))
        clock.seconds += 20
    assert instructions == ["", "", "", *["save"] * 6]
    monitor.save_began(9)
    clock.seconds += 200
    assert record(monitor, range(10, 11)) == ""  # it is still being uploaded
    commit(monitor, 9)

    assert record(monitor, range(11, 12)) == "save"


def test_with_auto_the_interval_is_measured_told_and_kept_by_a_new_driver(
    start: Start, run: RunDirectory, clock: FakeClock
) -> None:
    rule = replace(EVERY_TEN, kind="auto")
    first = start(monotonic=clock, interval=rule)
    begin(first)
    for step in range(1, 11):
        clock.seconds += 1440
        record(first, range(step, step + 1))
    first.save_began(10)
    commit(first, 10)
    first.flush()

    told = [event for event in run.read_events() if event["kind"] == "checkpoint-interval"]
    # 0.25 s stall, four hours of training and one that is taken for seen.
    young = pytest.approx(math.sqrt(2 * 0.25 * 5 * 3600), rel=0.01)
    assert [(event["seconds"], event["step"]) for event in told] == [(60.0, 0), (young, 10)]
    assert "no failure in 4h 00m of training" in told[1]["reason"]
    assert first.status()["checkpoint_interval_seconds"] == young
    second = start(monotonic=clock, interval=rule)
    assert scraped(second)["convmae_checkpoint_interval_seconds"] == told[1]["seconds"]
    begin(second, resume_step=10)
    second.flush()

    assert last_event(run)["kind"] == "checkpoint-interval"  # the driver's death is a failure
    assert "1 failure in 4h 00m of training" in last_event(run)["reason"]
    assert second.status()["checkpoint_interval_seconds"] < told[1]["seconds"]


def test_a_driver_that_died_is_a_failure(start: Start) -> None:
    first = start()
    begin(first)
    record(first, range(1, 6))
    first.flush()

    second = start()
    begin(second)
    second.end("stopped")
    third = start()
    begin(third)

    assert scraped(third)["convmae_failures_total DriverDied"] == 1


def test_the_ledger_has_each_sample_once_over_epochs_attempts_and_drivers(start: Start, run: RunDirectory) -> None:
    first = start()
    begin(first)
    first.quarantine([bad(7, 3), bad(9, 3)])
    first.quarantine([bad(7, 30)])
    begin(first, resume_step=2)
    first.quarantine([bad(7, 3), bad(8, 5)])
    first.flush()
    second = start()
    begin(second, resume_step=2)
    second.quarantine([bad(9, 3), bad(1, 6)])
    second.flush()

    rows = run.read_quarantine()

    assert [(row["id"], row["step"], row["attempt"]) for row in rows] == [(7, 3, 1), (9, 3, 1), (8, 5, 2), (1, 6, 3)]
    assert run.read_heartbeat()["quarantined"] == 4
    assert scraped(second)["convmae_quarantined_samples"] == 4


def test_a_monitor_that_is_started_again_amid_an_attempt_keeps_its_ledger(start: Start, run: RunDirectory) -> None:
    first = start()
    begin(first)
    first.quarantine([bad(7, 3)])
    first.flush()

    second = start()
    second.quarantine([bad(7, 3), bad(8, 4)])
    second.flush()

    assert [row["id"] for row in run.read_quarantine()] == [7, 8]


def test_skipped_steps_are_rows_events_and_a_counter(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 3))
    row = {"step": 3, "epoch": 0, "loss": None, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}
    row |= {"step_seconds": 0.5, "data_wait_seconds": 0.0, "skipped": "the loss of rank 1"}
    monitor.record(row, gradient_norm=float("inf"), reading=READING, ranks=RANKS)
    monitor.flush()
    assert run.read_heartbeat()["loss"] is None
    assert run.read_heartbeat()["gradient_norm"] == 0.5
    record(monitor, range(4, 6))
    monitor.flush()

    assert [row["step"] for row in run.read_history() if row["loss"] is None] == [3]
    assert (last_event(run)["kind"], last_event(run)["step"]) == ("skipped", 3)
    assert last_event(run)["reason"] == "the loss of rank 1 is not finite"
    assert scraped(monitor)["convmae_skipped_steps_total"] == 1


def test_what_a_rollback_leaves_out_is_known_to_every_later_driver(start: Start, run: RunDirectory) -> None:
    first = start()
    begin(first)
    record(first, range(1, 15))
    first.roll_back(first_step=11, last_step=14, reason="the gradient is not finite at step 14")

    assert last_event(run)["kind"] == "rollback"
    second = start()
    begin(second, resume_step=10)
    row = {"epoch": 0, "loss": None, "learning_rate": 1e-3, "world_size": 2, "attempt": 2, "skipped": "left out"}
    second.skip([{"step": step, **row} for step in range(11, 15)])
    second.roll_back(first_step=21, last_step=22, reason="the loss of rank 0 is not finite at step 22")
    second.flush()

    windows = [(window["first_step"], window["last_step"], window["attempt"]) for window in run.read_left_out()]
    assert windows == [(11, 14, 1), (21, 22, 2)]
    assert [row["step"] for row in run.read_history() if row["loss"] is None] == [11, 12, 13, 14]
    assert (scraped(second)["convmae_rollbacks_total"], scraped(second)["convmae_skipped_steps_total"]) == (2, 4)


def test_how_long_a_restart_took_and_what_for_is_told_once(start: Start, run: RunDirectory, clock: FakeClock) -> None:
    monitor = start(wall=clock)
    begin(monitor)
    record(monitor, range(1, 31))
    clock.seconds = 1000.5
    monitor.worker_failed("rank 1: lost", remedy="restart")
    clock.seconds = 1007.0
    begin(monitor, resume_step=20, started_at_seconds=1006.0)
    clock.seconds = 1007.5
    monitor.restored()
    clock.seconds = 1008.0
    record(monitor, range(21, 31), attempt=2)
    monitor.flush()

    (event,) = (event for event in run.read_events() if event["kind"] == "recovered")
    assert {key: value for key, value in event.items() if key.endswith("_seconds") and key != "at_seconds"} == {
        "down_seconds": 8.0, "detect_seconds": 0.5, "start_seconds": 5.5, "load_seconds": 1.0,
        "build_seconds": 0.5, "first_step_seconds": 0.5,
    }  # fmt: skip
    assert (event["step"], event["attempt"]) == (21, 2)
    assert scraped(monitor)["convmae_last_recovery_seconds down"] == 8.0


def test_a_new_driver_tells_how_long_the_run_was_down(start: Start, run: RunDirectory, clock: FakeClock) -> None:
    first = start(wall=clock)
    begin(first)
    record(first, range(1, 31))
    first.flush()
    second = start(wall=clock)
    clock.seconds = 1060.0
    begin(second, resume_step=20, started_at_seconds=1060.0)
    record(second, range(21, 23), attempt=2)
    second.flush()

    (event,) = (event for event in run.read_events() if event["kind"] == "recovered")
    assert (event["down_seconds"], event["start_seconds"]) == (60.0, 60.0)
    assert "detect_seconds" not in event


def held(step: int, *nodes: tuple[str, ...]) -> HeldCheckpoint:
    """A memory checkpoint of as many ranks as there are nodes."""
    files = tuple(CheckpointFile(f"000001-0001/rank-{rank:05d}.safetensors", 100, 0) for rank in range(len(nodes)))
    of_run = Commit(
        step=step, epoch=0, world_size=len(nodes), zero_stage=1, precision="fp32", recipe_digest="a",
        dataset_digest="b", order_version=1, seed=0, attempt=1, created_at_seconds=1.0, milestone=False, counters={},
        versions={}, files=files, claim=1,
    )  # fmt: skip
    return HeldCheckpoint(of_run, nodes)


def test_a_restart_is_fed_by_the_newest_memory_checkpoint(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 31))
    commit(monitor, 10)
    monitor.memory_held(held(20, ("a", "b"), ("b", "a")), stall_seconds=0.25)
    newest = held(28, ("a", "b"), ("b", "a"))
    monitor.memory_held(newest, stall_seconds=0.5)
    monitor.flush()
    series = scraped(monitor)
    assert (series["convmae_memory_checkpoint_step"], series["convmae_memory_checkpoint_bytes"]) == (28, 200)
    assert series["convmae_memory_checkpoints_total"] == 2
    assert series["convmae_memory_checkpoint_last_stall_seconds"] == 0.5

    monitor.worker_failed("rank 1: lost", remedy="restart")
    assert monitor.memory_checkpoint() == newest
    begin(monitor, resume_step=28, source="memory")

    event = last_event(run)
    assert (event["kind"], event["restored_from"], event["steps_redone"]) == ("restart", "memory", 2)
    assert monitor.memory_checkpoint() == newest
    # The step of the newest commit: what is consolidated and probed must be in the store.
    assert (monitor.status()["checkpoint_step"], monitor.status()["step"]) == (10, 28)


def test_memory_that_cannot_be_read_is_forgotten(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 31))
    monitor.memory_held(held(28, ("a", "b"), ("b", "a")), stall_seconds=0.5)

    monitor.memory_lost(step=28, reason="it is missing")
    begin(monitor, resume_step=20)

    assert monitor.memory_checkpoint() is None
    assert monitor.status()["memory_checkpoint_step"] is None
    lost, restart = run.read_events()[-2:]
    assert (lost["kind"], lost["step"], lost["reason"]) == ("memory-checkpoint-lost", 28, "it is missing")
    assert restart["restored_from"] == "store"


def test_what_was_rolled_back_is_not_resumed_from(start: Start) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 31))
    monitor.memory_held(held(20, ("a",)), stall_seconds=0.5)

    monitor.roll_back(first_step=11, last_step=31, reason="loss is not finite")

    assert monitor.memory_checkpoint() is None


def test_memory_checkpoints_are_progress_as_long_as_they_advance(start: Start) -> None:
    monitor = start(max_restarts=2)
    begin(monitor)
    for step in range(1, 6):
        monitor.memory_held(held(step, ("a",)), stall_seconds=0.5)
        assert monitor.worker_failed("rank 0: lost", remedy="restart") == ""
        begin(monitor, resume_step=step, source="memory")

    verdicts = []
    for _ in range(2):  # after the one that followed the last progress
        monitor.memory_held(held(5, ("a",)), stall_seconds=0.5)
        verdicts.append(monitor.worker_failed("rank 0: lost", remedy="restart"))
        begin(monitor, resume_step=5, source="memory")
    assert verdicts == ["", "3 failures without a new checkpoint; the last: rank 0: lost"]


def test_holders_on_nodes_that_the_run_has_left_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[list[str]] = []
    monkeypatch.setattr("jobs.monitor.run_memory.end_holders", lambda url, nodes: left.append(list(nodes)))
    monitor = start()
    begin(monitor)
    monitor.memory_held(held(10, ("a", "b"), ("b", "c"), ("c", "a")), stall_seconds=0.5)

    monitor.memory_held(held(20, ("b", "c"), ("c", "b")), stall_seconds=0.5)

    assert left == [[], ["a"]]


def test_a_memory_checkpoint_that_fails_is_reported(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    monitor.memory_not_held(step=7, error="rank 1: HolderFullError: no memory", is_off=True)
    monitor.flush()

    event = last_event(run)
    assert (event["kind"], event["step"]) == ("memory-checkpoint-failed", 7)
    assert event["reason"] == "rank 1: HolderFullError: no memory; no others are made in this attempt"
    assert scraped(monitor)["convmae_memory_checkpoint_failures_total"] == 1
