"""What a monitor writes, serves and keeps over drivers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from monitored_runs import (
    COMPUTE,
    IMAGES,
    RANKS,
    READING,
    SCHEDULE,
    FakeClock,
    FlakyStorage,
    Start,
    begin,
    commit,
    last_event,
    record,
    scraped,
    served,
    steps_of,
)
from probe_events import probe_event

from jobs.checkpoint.checkpoint import CLAIMS
from jobs.run.directory import HISTORY_PART_STEPS, RunDirectory
from pipeline.store.lease import hold_lease


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


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


def test_rank_seconds_are_those_in_which_ranks_train(start: Start, clock: FakeClock) -> None:
    monitor = start(monotonic=clock)
    clock.seconds += 100  # it waits for workers
    begin(monitor)
    for step in range(1, 11):
        clock.seconds += 3
        record(monitor, range(step, step + 1))
    clock.seconds += 50  # the group is being restarted
    begin(monitor, resume_step=10)
    clock.seconds += 1
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


def test_a_heartbeat_tells_of_no_step_that_is_not_written_yet(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 4))

    def step_goes_on(url: str) -> None:
        if "history" in url:
            record(monitor, range(4, 6))

    FlakyStorage.after_write = step_goes_on
    monitor.flush()

    assert run.read_heartbeat()["step"] == steps_of(run)[-1] == 3
    assert monitor.status()["step"] == 5


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


def test_a_stop_request_is_heard(start: Start, run: RunDirectory) -> None:
    monitor = start(flush_seconds=0.02)
    begin(monitor)
    assert not record(monitor, range(1, 2))

    run.write_stop_request()

    assert eventually(lambda: monitor.status()["state"] == "stopping")
    assert record(monitor, range(2, 3)) == "stop"
    monitor.end("stopped")
    assert "convmae stop" in last_event(run)["reason"]


def test_storage_that_is_away_does_not_end_the_heartbeat(start: Start, run: RunDirectory) -> None:
    monitor = start(flush_seconds=0.02)
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


def test_rates_are_those_of_the_last_steps(start: Start, clock: FakeClock) -> None:
    monitor = start(monotonic=clock)
    begin(monitor)
    for step in range(1, 101):
        clock.seconds += 2.0 if step < 50 else 0.5
        row = {"step": step, "epoch": 0, "loss": 1.0, "learning_rate": 0.1, "world_size": 2, "attempt": 1}
        monitor.record(
            row | {"step_seconds": 0.5, "data_wait_seconds": 0.1}, gradient_norm=1.0, reading=READING, ranks=RANKS
        )

    status = monitor.status()

    assert status["images_per_second"] == pytest.approx(IMAGES / 0.5)
    assert status["data_wait_ratio"] == pytest.approx(0.1 / 0.5)
    assert status["eta_seconds"] == pytest.approx((SCHEDULE.total_steps - 100) * 0.5)
    assert status["device_flops_per_second"] == pytest.approx(COMPUTE.step_flops / 0.5 / 2)
    assert status["mfu_ratio"] == pytest.approx(4e12 / 0.5 / 20e12)


def test_mfu_is_served_until_the_group_ends_and_its_devices_are_in_the_event(
    start: Start, run: RunDirectory, clock: FakeClock
) -> None:
    clock.tick_seconds = 0.5
    monitor = start(monotonic=clock)
    begin(monitor)
    record(monitor, range(1, 11))

    series = scraped(monitor)

    assert series["convmae_mfu_ratio"] == pytest.approx(monitor.status()["mfu_ratio"]) and series["convmae_mfu_ratio"]
    assert series["convmae_device_flops_per_second"] == pytest.approx(series["convmae_mfu_ratio"] * 20e12 / 2)
    event = last_event(run)
    assert (event["step_flops"], event["peak_flops_per_second"]) == (4e12, 20e12)
    assert event["devices"] == monitor.status()["devices"] == COMPUTE.devices

    begin(monitor, resume_step=10, compute=replace(COMPUTE, peak_flops_per_second=None))
    assert not {"convmae_mfu_ratio", "convmae_device_flops_per_second"} & set(scraped(monitor))
    record(monitor, range(11, 21), attempt=2)
    series = scraped(monitor)
    assert "convmae_mfu_ratio" not in series and series["convmae_device_flops_per_second"] > 0


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


def test_accuracies_are_kept_over_drivers_and_a_late_probe_is_not_the_newest(start: Start, run: RunDirectory) -> None:
    first = start()
    begin(first)
    for step, accuracy in ((0, 0.25), (400, 0.9), (200, 0.5)):
        first.probed(step, fields_of(step, accuracy))
    first.probed(400, fields_of(400, 0.9))  # whose answer was lost
    first.probe_failed(300, "the probe's process died")
    first.flush()
    assert [event["step"] for event in run.read_events() if event["kind"] == "probe"] == [0, 400, 200]

    for monitor in (first, start()):
        series = scraped(monitor)
        assert series["convmae_probe_accuracy_ratio knn_20"] == 0.9
        assert series["convmae_probe_control_accuracy_ratio linear"] == pytest.approx(0.27)
        low, high = (series[f"convmae_probe_accuracy_{end}_ratio knn_20"] for end in ("low", "high"))
        assert (low, high) == (pytest.approx(0.8506, abs=1e-4), pytest.approx(0.9343, abs=1e-4))
        assert series["convmae_probe_best_accuracy_low_ratio knn_20"] == low
        assert (series["convmae_probe_epoch"], series["convmae_probe_duration_seconds"]) == (4, 2.5)
        assert (series["convmae_probes_total"], series["convmae_probe_failures_total"]) == (3, 1)
        status = monitor.status()
        assert (status["probe_accuracies"]["knn_20"], status["probe_control"]["knn_20"]) == (0.9, 0.25)


def fields_of(step: int, accuracy: float) -> dict[str, Any]:
    event = probe_event(step, accuracy) | {"epoch": step // SCHEDULE.steps_per_epoch}
    return {key: value for key, value in event.items() if key not in ("at_seconds", "attempt", "kind", "step")}


def test_parts_are_compacted_in_the_background_and_a_store_that_hangs_meanwhile_delays_no_step_and_no_flush(
    start: Start, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, released = threading.Event(), threading.Event()

    def hangs(url: str) -> None:
        if "compacted-" in url:
            reached.set()
            assert released.wait(30)

    write = FlakyStorage.write
    monkeypatch.setattr(FlakyStorage, "write", lambda self, url, data: (hangs(url), write(self, url, data))[1])
    monitor = start(compact_seconds=0.02)
    for attempt in range(1, 20):
        begin(monitor, resume_step=attempt - 1)
        record(monitor, range(attempt, attempt + 3), attempt=attempt)
    assert reached.wait(10)

    began = time.monotonic()
    record(monitor, range(22, 25), attempt=19)
    monitor.flush()
    assert time.monotonic() - began < 5
    assert steps_of(run) == list(range(1, 25))

    released.set()
    assert eventually(lambda: "compacted.json" in run.storage.list_names(run.path("events")))
    assert steps_of(run) == list(range(1, 25))
    assert [event["attempt"] for event in run.read_events() if "steps_redone" in event] == list(range(1, 20))
    assert len(run.storage.list_names(run.path("history"))) < 19


def test_full_parts_of_the_attempt_that_trains_are_compacted(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    steps = 18 * HISTORY_PART_STEPS
    for first in range(1, steps, HISTORY_PART_STEPS):
        record(monitor, range(first, first + HISTORY_PART_STEPS))
        monitor.flush()
    record(monitor, range(steps + 1, steps + 4))  # not written yet

    monitor.compact(*monitor.settled())

    names = [name for name in run.storage.list_names(run.path("history")) if name.endswith(".jsonl")]
    assert names == [
        f"0001-{first:08d}.jsonl" for first in range(17 * HISTORY_PART_STEPS + 1, steps, HISTORY_PART_STEPS)
    ]
    monitor.flush()
    assert steps_of(run) == list(range(1, steps + 4))


def test_a_driver_that_was_cut_off_compacts_nothing(start: Start, run: RunDirectory) -> None:
    monitor = start(claim=1)
    for attempt in range(1, 20):
        begin(monitor)
        record(monitor, range(1, 3), attempt=attempt)
    before = run.storage.list_names(run.path("history"))

    with hold_lease(run.storage, run.path(CLAIMS), "drives the run", keeps_number=True, on_wait=lambda _: None) as mine:
        assert mine.number == 1
    with hold_lease(
        run.storage, run.path(CLAIMS), "drives the run", keeps_number=True, on_wait=lambda _: None
    ) as newer:
        assert newer.number == 2
        monitor.compact(*monitor.settled())
        assert run.storage.list_names(run.path("history")) == before
        start(claim=2).compact(19, 0)
    assert "compacted.json" in run.storage.list_names(run.path("history"))
