from __future__ import annotations

import json
import math
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.control import monitor as monitor_module
from jobs.control.monitor import MonitorConfig, RunMonitor
from jobs.metrics.rank_figures import RankFigures
from jobs.rank.step_reading import StepReading
from jobs.rank.watchdog import Examined, Pulse
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.schedule import Schedule
from jobs.run.directory import HISTORY_PART_STEPS, RunDirectory
from jobs.run.record import Tail
from pipeline.host.process_identity import ProcessIdentity
from pipeline.store.storage import Storage

SCHEDULE = Schedule.of(named_recipe("tiny"), steps_per_epoch=100)
IMAGES = 64
EVERY_TEN = IntervalRule("steps", every_steps=10, every_seconds=60.0, min_seconds=20.0, max_seconds=600.0)
READING = StepReading(storage_requests=3, block_cache_hits=2, block_cache_bytes=7)._asdict()
RANKS = (RankFigures(step_seconds=0.5, data_wait_seconds=0.1), RankFigures(step_seconds=0.5, data_wait_seconds=0.2))

Start = Callable[..., RunMonitor]


class FlakyStorage(Storage):
    """Fails as often as told."""

    failures_left = 0

    def write(self, url: str, data: bytes) -> None:
        if type(self).failures_left > 0:
            type(self).failures_left -= 1
            raise OSError(url)
        super().write(url, data)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.of(FlakyStorage(), str(tmp_path / "runs"), "first")


@pytest.fixture
def start(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a monitor of the run that writes only when told to; a second call is what a new driver does."""

    def make(max_restarts: int = 2, targets_folder: str = "", interval: IntervalRule = EVERY_TEN) -> RunMonitor:
        config = MonitorConfig(
            run=run,
            schedule=SCHEDULE,
            global_batch_size=IMAGES,
            max_restarts_without_progress=max_restarts,
            target_world_size=3,
            checkpoint_interval=interval,
            device="cpu",
            hang_seconds=30.0,
            host="127.0.0.1",
            metrics_port=0,
            targets_folder=targets_folder,
        )
        return RunMonitor(config)

    monkeypatch.setattr(monitor_module, "FLUSH_INTERVAL_SECONDS", 3600.0)
    return make


def begin(monitor: RunMonitor, world_size: int = 2, resume_step: int = 0, **counters: float) -> int:
    return monitor.begin_attempt(
        world_size=world_size, resume_step=resume_step, counters=counters, host="here", started_at_seconds=time.time()
    )


def record(monitor: RunMonitor, steps: range, attempt: int = 1) -> str:
    instruction = ""
    for step in steps:
        row = {
            "step": step,
            "epoch": (step - 1) // 100,
            "loss": 1 / step,
            "learning_rate": 1e-3,
            "world_size": 2,
            "attempt": attempt,
            "data_wait_seconds": 0.0,
        }
        instruction = monitor.record(row, gradient_norm=0.5, reading=READING, ranks=RANKS)
    return instruction


def commit(monitor: RunMonitor, step: int) -> None:
    monitor.checkpoint_committed(step=step, stall_seconds=0.25, duration_seconds=1.5, size_bytes=1000, milestone=False)


def steps_of(run: RunDirectory) -> list[int]:
    return [row["step"] for row in run.read_history()]


def last_event(run: RunDirectory) -> dict[str, Any]:
    return run.read_events()[-1]


def scraped(monitor: RunMonitor) -> dict[str, float]:
    """What is served once all is written."""
    monitor.flush()
    return served(monitor)


def served(monitor: RunMonitor) -> dict[str, float]:
    """Value of every series by name, with the labels other than the run."""
    with urllib.request.urlopen(monitor.status()["metrics_url"], timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        assert sample.labels.pop("run") == "first"
        found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


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


def test_counters_go_on_in_a_new_driver_and_redone_images_count(start: Start) -> None:
    first = start()
    begin(first)
    record(first, range(1, 31))
    first.worker_failed("rank 1: lost", remedy="restart")
    begin(first, resume_step=20)
    record(first, range(21, 31), attempt=2)
    first.flush()
    counters = first.save_began(30)
    assert (counters["images_total"], counters["restarts"]) == (40 * IMAGES, 1)
    assert counters["storage_requests_total"] == 40 * READING["storage_requests"]

    second = start()
    begin(second, resume_step=20, images_total=20 * IMAGES, restarts=0)
    record(second, range(21, 26), attempt=3)

    assert (second.save_began(20)["images_total"], second.save_began(20)["restarts"]) == (45 * IMAGES, 2)
    assert scraped(second)["convmae_images_total"] == 45 * IMAGES
    assert scraped(second)["convmae_storage_requests_total"] == 45 * READING["storage_requests"]
    assert scraped(second)["convmae_block_cache_bytes"] == READING["block_cache_bytes"]


def test_a_driver_that_is_killed_has_served_no_more_than_the_next_one_knows(start: Start) -> None:
    """A counter that goes back has begun anew, for Prometheus."""
    first = start()
    begin(first)
    record(first, range(1, 6))
    first.flush()
    record(first, range(6, 9))
    before = served(first)

    after = served(start())

    assert before["convmae_step"] == 8
    assert before["convmae_images_total"] == 5 * IMAGES
    assert {name for name in before if name.endswith("_total") and after.get(name, 0) < before[name]} == set()


def test_counters_come_from_the_commit_where_the_heartbeat_is_lost(start: Start, run: RunDirectory) -> None:
    run.write_events(1, [{"at_seconds": 1.0, "attempt": 1, "kind": "start", "step": 0}])

    monitor = start()
    begin(monitor, resume_step=20, images_total=20 * IMAGES, restarts=3)

    assert (monitor.save_began(20)["images_total"], monitor.save_began(20)["restarts"]) == (20 * IMAGES, 4)
    assert scraped(monitor)["convmae_images_total"] == 20 * IMAGES


def test_restarts_and_failures_are_counted_by_kind_over_drivers(start: Start) -> None:
    first = start()
    begin(first)
    record(first, range(1, 31))
    first.worker_failed("rank 1: StalledError: no batch", remedy="restart")
    begin(first, resume_step=20)
    first.worker_failed("the cluster is gone", remedy="restart")
    begin(first, world_size=1, resume_step=20)
    begin(first, world_size=2, resume_step=20)
    commit(first, 20)
    first.flush()

    second = start()
    begin(second, resume_step=20, **{"restarts_total:resize": 5.0})

    series = scraped(second)
    assert series["convmae_restarts_total restart"] == 3
    assert series["convmae_restarts_total resize"] == 5  # the commit knows more than the heartbeat
    assert series["convmae_failures_total StalledError"] == series["convmae_failures_total other"] == 1
    assert (series["convmae_steps_redone_total"], series["convmae_checkpoints_total"]) == (10, 1)
    assert series["convmae_checkpoint_bytes"] == 1000  # the new driver knows of the newest checkpoint


def test_rank_seconds_are_those_in_which_ranks_train(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.control.monitor.time.monotonic", lambda: now)
    monitor = start()
    now += 100  # it waits for workers
    begin(monitor)
    for step in range(1, 11):
        now += 3
        record(monitor, range(step, step + 1))
    now += 50  # the group is being restarted
    begin(monitor, resume_step=10)
    now += 1
    record(monitor, range(11, 12))

    assert scraped(monitor)["convmae_worker_seconds_total"] == 2 * (10 * 3 + 1)


def test_nothing_is_left_of_a_group_that_ended(start: Start) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 31))
    before = scraped(monitor)
    assert before["convmae_rank_data_wait_seconds 0"] == 0.1
    assert before["convmae_rank_data_wait_seconds 1"] == 0.2
    assert before["convmae_world_size_ranks"] == 2

    monitor.worker_failed("rank 1: lost", remedy="restart")
    after = scraped(monitor)

    assert not [name for name in after if name.startswith("convmae_rank_")]
    assert after["convmae_world_size_ranks"] == 0
    assert after["convmae_target_world_size_ranks"] == 3
    begin(monitor, resume_step=20)
    assert "convmae_images_per_second" not in scraped(monitor)


def test_a_monitor_that_is_started_again_amid_an_attempt_goes_on(start: Start, run: RunDirectory) -> None:
    first = start()
    begin(first)
    record(first, range(1, 11))
    first.flush()

    second = start()  # Ray restarts the actor; rank 0 has not noticed yet
    record(second, range(11, 21))
    commit(second, 20)
    second.flush()

    assert [event["kind"] for event in run.read_events()] == ["start", "checkpoint"]
    assert steps_of(run) == list(range(1, 21))
    assert second.save_began(20)["images_total"] == 20 * IMAGES


def test_failures_without_progress_are_given_up(start: Start) -> None:
    monitor = start(max_restarts=2)

    assert [monitor.worker_failed("rank 0: boom", remedy="restart") for _ in range(2)] == ["", ""]
    assert monitor.worker_failed("rank 0: boom", remedy="restart") == (
        "3 failures without a new checkpoint; the last: rank 0: boom"
    )


def test_a_checkpoint_is_progress(start: Start) -> None:
    monitor = start(max_restarts=2)
    begin(monitor)

    for step in range(1, 10):
        assert monitor.worker_failed("rank 0: boom", remedy="restart") == ""
        assert monitor.worker_failed("rank 0: boom", remedy="restart") == ""
        commit(monitor, step)


def test_no_restart_is_made_where_none_is_allowed(start: Start) -> None:
    assert start(max_restarts=0).worker_failed("rank 0: boom", remedy="restart").endswith("rank 0: boom")


def test_what_no_restart_can_mend_is_given_up_at_once(start: Start) -> None:
    assert start(max_restarts=100).worker_failed("rank 0: bad data", remedy="none") == "rank 0: bad data"


def test_what_the_store_took_once_is_asked_for_again(start: Start) -> None:
    refused, remedy = "rank 0: CredentialsError: expired", "restart after progress"
    assert start().worker_failed(refused, remedy) == refused, "nothing was trained yet"

    monitor = start(max_restarts=2)
    begin(monitor)
    record(monitor, range(1, 3))
    assert monitor.worker_failed(refused, remedy) == ""
    begin(monitor)  # from step 0: there is no checkpoint
    assert monitor.worker_failed(refused, remedy) == ""
    assert monitor.worker_failed(refused, remedy).startswith("3 failures without a new checkpoint")
    monitor.flush()
    assert start().worker_failed(refused, remedy) == "", "an earlier driver trained"


def test_rare_flushes_lose_no_row(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    steps = 2 * HISTORY_PART_STEPS + 500

    record(monitor, range(1, steps + 1))
    monitor.flush()
    record(monitor, range(steps + 1, steps + 11))
    monitor.flush()

    assert steps_of(run) == list(range(1, steps + 11))
    names = run.storage.list_names(run.path("history"))
    assert names == [f"0001-{first:08d}.jsonl" for first in (1, HISTORY_PART_STEPS + 1, 2 * HISTORY_PART_STEPS + 1)]


def test_a_heartbeat_tells_of_no_step_that_is_not_written_yet(
    start: Start, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 4))
    write = Tail.write

    def while_steps_go_on(tail: Tail, directory: RunDirectory) -> None:
        write(tail, directory)
        record(monitor, range(4, 6))

    monkeypatch.setattr(Tail, "write", while_steps_go_on)
    monitor.flush()

    assert run.read_heartbeat()["step"] == steps_of(run)[-1] == 3


@pytest.mark.parametrize("failures", [1, 2, 3, 4])
def test_a_flush_that_fails_is_made_up_for(start: Start, run: RunDirectory, failures: int) -> None:
    monitor = start()
    begin(monitor)
    steps = 2 * HISTORY_PART_STEPS + 500
    record(monitor, range(1, steps + 1))
    commit(monitor, steps)
    FlakyStorage.failures_left = failures
    while FlakyStorage.failures_left:
        with pytest.raises(OSError, match="first"):
            monitor.flush()

    record(monitor, range(steps + 1, steps + 6))
    monitor.flush()

    assert steps_of(run) == list(range(1, steps + 6))
    assert [event["kind"] for event in run.read_events()] == ["start", "checkpoint"]
    assert run.read_heartbeat()["step"] == steps + 5


def test_unwritten_rows_of_an_attempt_are_written_when_the_next_begins(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 31))
    monitor.worker_failed("rank 1: lost", remedy="restart")

    begin(monitor, resume_step=20)
    record(monitor, range(21, 26), attempt=2)
    monitor.flush()

    assert [(row["step"], row["attempt"]) for row in run.read_history()] == (
        [(step, 1) for step in range(1, 21)]
        + [(step, 2) for step in range(21, 26)]
        + [(step, 1) for step in range(26, 31)]
    )


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_stop_request_is_heard(start: Start, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "FLUSH_INTERVAL_SECONDS", 0.02)
    monitor = start()
    begin(monitor)
    assert not record(monitor, range(1, 2))

    run.write_stop_request()

    assert eventually(lambda: monitor.status()["state"] == "stopping")
    assert record(monitor, range(2, 3)) == "stop"
    monitor.end("stopped")
    assert "convmae stop" in last_event(run)["reason"]


def test_ranks_are_asked_to_pause_until_they_have_saved(start: Start) -> None:
    monitor = start()
    assert not monitor.pause()
    begin(monitor)
    record(monitor, range(1, 2))
    assert not monitor.pause()

    # A reply that comes too late for a step is not read: the next one must say the same.
    assert [record(monitor, range(step, step + 1)) for step in (2, 3)] == ["pause", "pause"]
    assert not monitor.pause()
    monitor.paused()

    assert monitor.pause()
    assert monitor.pause(), "they still do"
    assert not record(monitor, range(4, 5)), "nobody ended them, and they train on"
    assert not monitor.pause()
    monitor.end_pause()  # they did not save in time
    assert not record(monitor, range(5, 6))


def test_who_stood_still_in_one_attempt_does_not_in_the_next(start: Start) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 2))
    monitor.pause()
    monitor.paused()
    begin(monitor, resume_step=1)
    assert not monitor.pause()
    monitor.paused()

    monitor.worker_failed("rank 0: ActorDiedError: killed", remedy="restart")
    monitor.group_ended()

    assert monitor.status()["state"] == "restarting"
    assert not monitor.pause()


def test_a_node_that_is_unreachable_is_why_the_group_ended(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 4))
    for rank, node in enumerate("abba"):
        monitor.pulse(Pulse(1, rank, f"host-{node}", node, ProcessIdentity(100 + rank), "", "step", 7, 0.0))

    monitor.unreachable({"b": "host-b, 10.0.0.2"}, 6.4)
    # What Ray says of the ranks that are ended for it, and of those that waited for them.
    assert monitor.worker_failed("rank 0: ActorDiedError: killed", remedy="restart") == ""
    begin(monitor, resume_step=3)
    monitor.flush()

    text = "the node of ranks 1, 2 (host-b, 10.0.0.2) has been unreachable for 6 s"
    told = next(event for event in run.read_events() if event["kind"] == "unreachable")
    assert (told["reason"], told["step"], told["attempt"]) == (text, 3, 1)
    assert last_event(run)["reason"] == text
    assert scraped(monitor)["convmae_failures_total NodeUnreachable"] == 1
    monitor.worker_failed("rank 1: ValueError: boom", remedy="restart")
    begin(monitor, resume_step=3)
    assert last_event(run)["reason"] == "rank 1: ValueError: boom", "of its own attempt alone"


def test_a_node_that_is_unreachable_while_ranks_start_is_told_by_its_name(start: Start, run: RunDirectory) -> None:
    monitor = start()

    monitor.unreachable({"b": "host-b, 10.0.0.2"}, 6.0)
    monitor.flush()

    text = "a node where ranks were to start (host-b, 10.0.0.2) has been unreachable for 6 s"
    assert last_event(run)["reason"] == text


def test_nodes_that_are_lost_together_are_told_in_one_line(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    for rank in range(12):
        monitor.pulse(Pulse(1, rank, "host", f"node-{rank // 2}", ProcessIdentity(100 + rank), "", "step", 7, 0.0))

    monitor.unreachable({f"node-{number}": f"host-{number}, 10.0.0.{number}" for number in range(1, 6)}, 6.0)
    monitor.flush()

    assert last_event(run)["reason"] == (
        "the nodes of ranks 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 (host-1, 10.0.0.1; host-2, 10.0.0.2; host-3, 10.0.0.3;"
        " host-4, 10.0.0.4 and 1 more) have been unreachable for 6 s"
    )


def test_a_drained_node_is_told_and_has_the_ranks_save_now_and_before_it_goes(
    start: Start, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "LEAST_SAVE_SECONDS", 29.3)
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 6))

    monitor.drain([1, 3], 29.6)

    # A reply that comes too late for a step is not read: the next one must say the same.
    assert [record(monitor, range(step, step + 1)) for step in (6, 7)] == ["save", "save"]
    monitor.save_began(7)
    assert record(monitor, range(8, 9)) == ""
    time.sleep(0.4)
    assert record(monitor, range(9, 10)) == "pause"
    begin(monitor, resume_step=9)
    assert record(monitor, range(10, 11)) == "", "the drain is over"
    monitor.flush()
    told = next(event for event in run.read_events() if event["kind"] == "drain")
    assert (told["step"], told["reason"]) == (5, "the node of ranks 1, 3 goes away in 30 s")


def test_a_run_that_has_no_room_says_so_until_it_trains(start: Start, run: RunDirectory) -> None:
    monitor = start()

    monitor.waiting(1, 2)

    assert (monitor.status()["state"], monitor.status()["waiting"]) == ("waiting", True)
    begin(monitor)
    assert (monitor.status()["state"], monitor.status()["waiting"]) == ("running", False)
    monitor.waiting(0, 2)
    monitor.request_stop("SIGTERM")
    monitor.waiting(0, 2)
    assert (monitor.status()["state"], monitor.status()["waiting"]) == ("stopping", True)
    monitor.flush()
    assert "there is room for 0 workers, and min_workers is 2" in last_event(run)["reason"]


def test_with_seconds_the_ranks_save_when_it_is_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.control.monitor.time.monotonic", lambda: now)
    monitor = start(interval=replace(EVERY_TEN, kind="seconds"))
    begin(monitor)
    series = scraped(monitor)
    assert series["convmae_checkpoint_interval_seconds"] == 60
    assert "convmae_checkpoint_interval_steps" not in series

    instructions = []
    for step in range(1, 10):
        instructions.append(record(monitor, range(step, step + 1)))
        now += 20
    assert instructions == ["", "", "", *["save"] * 6]
    monitor.save_began(9)
    now += 200
    assert record(monitor, range(10, 11)) == ""  # it is still being uploaded
    commit(monitor, 9)

    assert record(monitor, range(11, 12)) == "save"


def test_with_auto_the_interval_is_measured_told_and_kept_by_a_new_driver(
    start: Start, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.control.monitor.time.monotonic", lambda: now)
    rule = replace(EVERY_TEN, kind="auto")
    first = start(interval=rule)
    begin(first)
    for step in range(1, 11):
        now += 1440
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
    second = start(interval=rule)
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


def test_storage_that_is_away_does_not_end_the_heartbeat(
    start: Start, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "FLUSH_INTERVAL_SECONDS", 0.02)
    monitor = start()
    begin(monitor)
    FlakyStorage.failures_left = 3

    record(monitor, range(1, 6))

    assert eventually(lambda: run.read_heartbeat()["step"] == 5)
    assert steps_of(run) == list(range(1, 6))
    monitor.end("stopped")


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_the_end_is_written_at_once(start: Start, run: RunDirectory, outcome: str) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 6))

    monitor.end(outcome, "because")

    assert run.read_heartbeat()["state"] == outcome
    event = last_event(run)
    assert (event["kind"], event["step"], event["reason"]) == (outcome, 5, "because")
    assert steps_of(run) == list(range(1, 6))


def test_metrics_are_served_over_http(start: Start) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 31))
    commit(monitor, 30)
    monitor.worker_failed("rank 1: lost", remedy="restart")
    begin(monitor, resume_step=30)
    record(monitor, range(31, 41), attempt=2)

    series = scraped(monitor)

    status = monitor.status()
    assert series["convmae_step"] == 40
    assert series["convmae_loss"] == pytest.approx(1 / 40)
    assert series["convmae_images_per_second"] == pytest.approx(status["images_per_second"])
    assert series["convmae_images_total"] == 40 * IMAGES
    assert series["convmae_restarts_total restart"] == 1
    assert series["convmae_total_steps"] == SCHEDULE.total_steps
    assert (series["convmae_checkpoint_step"], series["convmae_checkpoint_bytes"]) == (30, 1000)
    assert series["convmae_world_size_ranks"] == 2


def test_rates_are_those_of_the_last_steps(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.control.monitor.time.monotonic", lambda: now)
    monitor = start()
    begin(monitor)
    for step in range(1, 101):
        now += 2.0 if step < 50 else 0.5
        row = {"step": step, "epoch": 0, "loss": 1.0, "learning_rate": 0.1, "world_size": 2, "attempt": 1}
        monitor.record(row | {"data_wait_seconds": 0.1}, gradient_norm=1.0, reading=READING, ranks=RANKS)

    status = monitor.status()

    assert status["images_per_second"] == pytest.approx(IMAGES / 0.5)
    assert status["data_wait_ratio"] == pytest.approx(0.1 / 0.5)
    assert status["eta_seconds"] == pytest.approx((SCHEDULE.total_steps - 100) * 0.5)


def test_the_endpoint_is_announced_to_prometheus(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "targets"
    folder.mkdir()

    monitor = start(targets_folder=str(folder))

    (path,) = folder.iterdir()
    (target,) = json.loads(path.read_text())
    assert path.name == "first.json"
    assert [f"http://{address}/metrics" for address in target["targets"]] == [monitor.status()["metrics_url"]]
    assert target["labels"] == {"job": "convmae", "instance": "first"}, "which do not change with the port"


@pytest.mark.parametrize(("outcome", "left"), [("finished", 0), ("stopped", 0), ("failed", 1)])
def test_only_a_run_that_failed_stays_a_target(start: Start, tmp_path: Path, outcome: str, left: int) -> None:
    folder = tmp_path / "targets"
    folder.mkdir()
    monitor = start(targets_folder=str(folder))

    monitor.end(outcome)

    assert len(list(folder.iterdir())) == left


def bad(sample: int, step: int) -> dict[str, Any]:
    told = {"fault": "checksum", "url": "s3://b/shard-000000.tar", "reason": "flipped"}
    return {"id": sample, "step": step, "substitute": sample + 1, **told}


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
    row |= {"data_wait_seconds": 0.0, "skipped": "the loss of rank 1"}
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
    second.leave_out([{"step": step, **row} for step in range(11, 15)])
    second.roll_back(first_step=21, last_step=22, reason="the loss of rank 0 is not finite at step 22")
    second.flush()

    windows = [(window["first_step"], window["last_step"], window["attempt"]) for window in run.read_left_out()]
    assert windows == [(11, 14, 1), (21, 22, 2)]
    assert [row["step"] for row in run.read_history() if row["loss"] is None] == [11, 12, 13, 14]
    assert (scraped(second)["convmae_rollbacks_total"], scraped(second)["convmae_skipped_steps_total"]) == (2, 4)


def test_a_rank_that_hangs_is_told_and_is_why_the_attempt_ended(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 4))
    now = time.monotonic()
    for rank in range(2):
        monitor.pulse(Pulse(1, rank, "node-1", "n", ProcessIdentity(100 + rank), "", "step", 7 + rank, 0.0))
    examined = []

    def examine(pulse: Pulse) -> Examined:
        examined.append(pulse.rank)
        # What the controller says when it sees the death before the examination has ended.
        assert monitor.worker_failed("rank 0: ActorDiedError: killed", remedy="restart") == ""
        return Examined("stopped (T)", "stacks")

    monitor.look_for_hangs(now + 29.0, examine)
    assert examined == []
    monitor.look_for_hangs(now + 31.0, examine)
    monitor.look_for_hangs(now + 99.0, examine)
    assert examined == [0, 1]  # neither spoke
    monitor.flush()

    hang = next(event for event in run.read_events() if event["kind"] == "hang")
    assert (hang["rank"], hang["host"], hang["pid"], hang["step"], hang["stack"]) == (0, "node-1", 100, 3, "stacks")
    assert scraped(monitor)["convmae_hangs_total"] == 2
    begin(monitor, resume_step=3)
    assert last_event(run)["kind"] == "restart"
    assert last_event(run)["reason"].startswith("rank 1 on node-1 (pid 101) has not spoken for 31 s; its process is st")


def test_how_long_a_restart_took_and_what_for_is_told_once(
    start: Start, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.control.monitor.time.time", lambda: now)
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 31))
    now = 1000.5
    monitor.worker_failed("rank 1: lost", remedy="restart")
    now = 1007.0
    monitor.begin_attempt(world_size=2, resume_step=20, counters={}, host="here", started_at_seconds=1006.0)
    now = 1007.5
    monitor.restored()
    now = 1008.0
    record(monitor, range(21, 31), attempt=2)
    monitor.flush()

    (event,) = (event for event in run.read_events() if event["kind"] == "recovered")
    assert {key: value for key, value in event.items() if key.endswith("_seconds") and key != "at_seconds"} == {
        "down_seconds": 8.0, "detect_seconds": 0.5, "start_seconds": 5.5, "load_seconds": 1.0,
        "build_seconds": 0.5, "first_step_seconds": 0.5,
    }  # fmt: skip
    assert (event["step"], event["attempt"]) == (21, 2)
    assert scraped(monitor)["convmae_last_recovery_seconds down"] == 8.0


def test_a_new_driver_tells_how_long_the_run_was_down(
    start: Start, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.control.monitor.time.time", lambda: now)
    first = start()
    begin(first)
    record(first, range(1, 31))
    first.flush()
    second = start()
    now = 1060.0
    begin(second, resume_step=20)
    record(second, range(21, 23), attempt=2)
    second.flush()

    (event,) = (event for event in run.read_events() if event["kind"] == "recovered")
    assert (event["down_seconds"], event["start_seconds"]) == (60.0, 60.0)
    assert "detect_seconds" not in event
