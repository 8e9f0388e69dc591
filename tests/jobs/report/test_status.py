from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.recipe.named_recipes import named_recipe
from jobs.report.status import SILENT_SECONDS, event_line, run_status, status_lines
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

NOW = 1_700_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.of(Storage(), str(tmp_path), "first")
    directory.claim(named_recipe("tiny"))
    return directory


def heartbeat(state: str, silent_seconds: float) -> dict[str, Any]:
    return {"state": state, "step": 30, "total_steps": 120, "updated_at_seconds": NOW - silent_seconds}


def test_a_run_without_a_heartbeat_is_submitted(run: RunDirectory) -> None:
    status = run_status(run, NOW)

    assert status == {
        "run": "first",
        "url": run.url,
        "state": "submitted",
        "step": 0,
        "total_steps": 0,
        "committed_steps": [],
    }


@pytest.mark.parametrize("state", ["starting", "running", "restarting", "stopping"])
def test_a_live_run_that_fell_silent_is_interrupted(run: RunDirectory, state: str) -> None:
    run.write_heartbeat(heartbeat(state, SILENT_SECONDS - 1))
    assert run_status(run, NOW)["state"] == state

    run.write_heartbeat(heartbeat(state, SILENT_SECONDS + 1))
    assert run_status(run, NOW)["state"] == "interrupted"


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_ended_stays_what_it_became(run: RunDirectory, state: str) -> None:
    run.write_heartbeat(heartbeat(state, 1e6))

    assert run_status(run, NOW)["state"] == state


def test_committed_steps_are_read_from_commits(run: RunDirectory) -> None:
    run.storage.write(run.path("commits", "step-00000020.json"), b"{}")
    run.storage.write(run.path("commits", "step-00000003.json"), b"{}")
    run.storage.write(run.path("commits", "other.json"), b"{}")

    assert run_status(run, NOW)["committed_steps"] == [3, 20]


def test_lines_say_how_far_a_live_run_is(run: RunDirectory) -> None:
    figures = {"loss": 0.123456789, "images_per_second": 812.34, "eta_seconds": 3700.0, "world_size": 2}
    run.write_heartbeat(
        {**heartbeat("running", 1), **figures, "steps_per_epoch": 20, "metrics_url": "http://127.0.0.1:1/metrics"}
    )

    lines = dict(status_lines(run_status(run, NOW)))

    assert lines["step"] == "30 of 120 (25.0%)"
    assert lines["loss"] == "0.123457"
    assert lines["images/s"] == "812.3"
    assert lines["ETA"] == "1h 01m"
    assert (lines["workers"], lines["epoch"], lines["checkpoints"]) == ("2", "1 of 6", "none yet")
    assert lines["metrics"] == "http://127.0.0.1:1/metrics"


def test_lines_say_what_of_its_devices_a_run_uses(run: RunDirectory) -> None:
    reached = {"device_flops_per_second": 405.5e12, "devices": "8 x NVIDIA H100 80GB HBM3 (data sheet)"}
    run.write_heartbeat({**heartbeat("running", 1), **reached, "mfu_ratio": 0.41})
    assert dict(status_lines(run_status(run, NOW)))["TFLOP/s"] == (
        "406 a device; MFU 41.0% of 8 x NVIDIA H100 80GB HBM3 (data sheet)"
    )

    run.write_heartbeat({**heartbeat("running", 1), **reached, "mfu_ratio": None})
    assert dict(status_lines(run_status(run, NOW)))["TFLOP/s"].startswith("406 a device of 8 x")
    run.write_heartbeat(heartbeat("running", 1))
    assert "TFLOP/s" not in dict(status_lines(run_status(run, NOW)))


def test_lines_of_a_run_without_a_heartbeat_have_no_figures(run: RunDirectory) -> None:
    lines = dict(status_lines(run_status(run, NOW)))

    assert lines["state"] == "submitted"
    assert lines["step"] == "0 of 0"
    assert {lines[field] for field in ("loss", "learning rate", "images/s", "epoch", "ETA")} == {"-"}


def test_an_ended_run_has_no_eta(run: RunDirectory) -> None:
    run.write_heartbeat(heartbeat("finished", 1))

    assert "ETA" not in dict(status_lines(run_status(run, NOW)))


def test_an_event_is_one_line_without_empty_fields() -> None:
    event = {"at_seconds": NOW, "attempt": 2, "kind": "restart", "reason": "rank 1: lost", "step": 0, "host": ""}

    assert event_line(event) == "2023-11-14 22:13:20  attempt 2  restart: reason rank 1: lost, step 0"


def test_operations_in_an_event_have_few_digits() -> None:
    event = {"at_seconds": NOW, "attempt": 1, "kind": "start", "step": 0}

    line = event_line(event | {"step_flops": 269_072_000_000_000, "peak_flops_per_second": 7.9152e15})

    assert line.endswith("start: step 0, step_flops 2.691e+14, peak_flops_per_second 7.915e+15")


def test_operations_that_change_with_the_size_of_images_are_named_by_their_steps() -> None:
    event = {"at_seconds": NOW, "attempt": 1, "kind": "start", "step": 0, "step_flops_from": [[1, 1e12], [2801, 2e12]]}

    assert event_line(event).endswith("start: step 0, step_flops_from 1e+12 from step 1 and 2e+12 from step 2,801")


def test_age_of_the_checkpoint_and_hours_are_shown(run: RunDirectory) -> None:
    spoken = heartbeat("running", 1) | {
        "checkpoint_at_seconds": NOW - 125,
        "checkpoint_interval_seconds": 93.4,
        "worker_seconds_total": 5400.0,
        "world_size": 6,
        "target_world_size": 8,
        "data_wait_ratio": 0.031,
        "restarts": 2,
    }
    run.write_heartbeat(spoken | {"device": "cuda"})
    status = run_status(run, NOW)
    lines = dict(status_lines(status))

    assert (status["checkpoint_age_seconds"], status["worker_hours"]) == (125, 1.5)
    assert (lines["newest one"], lines["GPU-hours"], lines["workers"]) == ("2m 05s ago", "1.50", "6 of 8")
    assert lines["save every"] == "1m 33s"
    assert lines["data wait"] == "3.1%"
    assert "2 restarts" in lines["attempt"]
    run.write_heartbeat(spoken | {"device": "cpu", "checkpoint_interval_seconds": None})
    lines = dict(status_lines(run_status(run, NOW)))
    assert lines["worker-hours"] == "1.50"
    assert "save every" not in lines
