"""A run in TensorBoard, MLflow and W&B, as its monitor writes it there: real libraries, and MLflow's real server."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from loopback_server import LoopbackServer
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_server import MlflowServer, mlflow_server
from monitored_runs import IMAGES, Start, begin, last_event, record
from patience import wait_until
from probe_events import probe_event
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator
from wandb_files import offline_runs

from jobs.monitor.monitor import RunMonitor
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import TrackerName
from jobs.run.directory import RunDirectory
from jobs.trackers.tracker import Point, TrackedRun
from jobs.trackers.trackers import KINDS, TrackerSettings
from pipeline.store.storage import Storage

SOON = 0.05
NEVER = 3600.0
ALL = list(range(1, 41))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The variables of this process, which a monitor has for itself, as they were."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


def settings(
    *names: TrackerName, send_seconds: float = SOON, end_seconds: float = 60.0, **environ: str
) -> TrackerSettings:
    recipe = named_recipe("tiny").amended({"tracker": list(names)})
    found = TrackerSettings.of(recipe, environ)
    return dataclasses.replace(found, send_seconds=send_seconds, end_seconds=end_seconds)


def lose_a_rank(monitor: RunMonitor) -> None:
    """Train to step 35 in two attempts: the second does steps 21 to 30 again."""
    begin(monitor)
    record(monitor, range(1, 31))
    monitor.worker_failed("rank 1: lost", remedy="restart")
    begin(monitor, resume_step=20)
    record(monitor, range(21, 36), attempt=2)
    monitor.flush()


def go_on(monitor: RunMonitor) -> None:
    """Train to the end as the next driver's monitor, which begins at step 31 again; the encoder is probed late."""
    begin(monitor, world_size=1, resume_step=30)
    record(monitor, range(31, 41), attempt=3)
    monitor.probed(
        20,
        {
            key: value
            for key, value in probe_event(20, 0.5).items()
            if key not in ("step", "kind", "attempt", "at_seconds")
        },
    )
    monitor.end("finished")


def kinds(run: RunDirectory) -> list[str]:
    return [event["kind"] for event in run.read_events()]


def shown_by_tensorboard(folder: Path) -> EventAccumulator:
    shown = EventAccumulator(str(folder), STORE_EVERYTHING_SIZE_GUIDANCE)
    shown.Reload()
    return shown


def steps_in(shown: EventAccumulator, name: str) -> list[int]:
    return [point.step for point in shown.Scalars(name)]


def runs_of(server: MlflowServer) -> list[Run]:
    client = MlflowClient(server.url)
    known = client.get_experiment_by_name("convmae")
    return list(client.search_runs([known.experiment_id])) if known else []


def steps_of(server: MlflowServer, run: Run, name: str = "loss") -> list[int]:
    return [point.step for point in MlflowClient(server.url).get_metric_history(run.info.run_id, name)]


@pytest.mark.parametrize("first_sends", [SOON, NEVER], ids=["alive", "killed before it sent"])
def test_tensorboard_shows_every_step_once_over_attempts_and_drivers(
    start: Start, run: RunDirectory, first_sends: float
) -> None:
    first = start(trackers=settings("tensorboard", send_seconds=first_sends))
    lose_a_rank(first)
    if first_sends == SOON:
        wait_until("the first driver's steps", lambda: run.read_tracked("tensorboard").get("step") == 35, 20)

    go_on(start(trackers=settings("tensorboard")))

    shown = shown_by_tensorboard(Path(run.url) / "tensorboard")
    for name in ("loss", "learning_rate", "world_size", "images_per_second", "epoch"):
        assert steps_in(shown, name) == ALL, name
    assert [point.value for point in shown.Scalars("loss")] == pytest.approx([1 / step for step in ALL])
    assert {point.value for point in shown.Scalars("images_per_second")} == {IMAGES / 0.5}
    # The history has no norms of gradients.
    assert steps_in(shown, "gradient_norm") == (ALL if first_sends == SOON else list(range(31, 41)))
    assert [(point.step, point.value) for point in shown.Scalars("probe_knn_20")] == [(20, pytest.approx(0.5))]
    notes = shown.Tensors("events/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "attempt 3, step 40: finished" in notes and "restart: rank 1: lost" in notes
    assert b"model.mask_ratio" in shown.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboards_files_reach_an_object_store_in_parts(start: Start, open_s3: Storage, tmp_path: Path) -> None:
    there = RunDirectory.of(open_s3, "s3://bucket/runs", "first")
    monitor = start(trackers=settings("tensorboard"), directory=there)
    begin(monitor)
    for first_step in range(1, 1501, 250):
        record(monitor, range(first_step, first_step + 250))
        wait_until("the steps", lambda last=first_step + 249: there.read_tracked("tensorboard").get("step") == last, 30)
    monitor.end("finished")

    names = open_s3.list_names(there.path("tensorboard"))
    assert len(names) == 2
    for name in names:
        (tmp_path / name).write_bytes(open_s3.read(there.path("tensorboard", name)))
    assert steps_in(shown_by_tensorboard(tmp_path), "loss") == list(range(1, 1501))


def test_mlflow_has_one_run_with_every_step_once_over_attempts_and_drivers(
    start: Start, run: RunDirectory, server: MlflowServer
) -> None:
    there = settings("mlflow", MLFLOW_TRACKING_URI=server.url)
    first = start(trackers=there)
    lose_a_rank(first)
    wait_until("the first driver's steps", lambda: run.read_tracked("mlflow").get("step") == 35, 60)
    run.write_tracked("mlflow", {**run.read_tracked("mlflow"), "step": 17})  # it was killed before it noted that

    go_on(start(trackers=there))

    (found,) = [each for each in runs_of(server) if each.data.tags["convmae.directory"] == run.url]
    for name in ("loss", "learning_rate", "world_size", "images_per_second", "gradient_norm"):
        assert steps_of(server, found, name) == ALL, name
    assert steps_of(server, found, "probe_knn_20") == [20]
    assert (found.info.status, found.data.tags["convmae.state"]) == ("FINISHED", "finished")
    assert found.info.run_name == "first"
    assert found.data.params["model.mask_ratio"] == "0.75" and found.data.params["tracker"] == "['mlflow']"
    assert "restart: rank 1: lost" in found.data.tags["mlflow.note.content"]
    assert {"tracker-lost", "tracker-back"}.isdisjoint(kinds(run))


def test_a_resumed_run_is_running_again_and_a_changed_field_is_a_tag(
    start: Start, run: RunDirectory, server: MlflowServer
) -> None:
    there = settings("mlflow", MLFLOW_TRACKING_URI=server.url, MLFLOW_EXPERIMENT_NAME="another")
    client = MlflowClient(server.url)

    def found() -> Run:
        (only,) = client.search_runs([client.get_experiment_by_name("another").experiment_id])
        return only

    begin(first := start(trackers=there))
    record(first, range(1, 4))
    first.end("stopped")
    assert found().info.status == "KILLED"
    second = start(trackers=dataclasses.replace(there, recipe={**there.recipe, "max_workers": 7}))
    begin(second, resume_step=3)
    wait_until("the run", lambda: found().info.status == "RUNNING", 20)
    record(second, range(4, 6), attempt=2)
    second.end("failed", "no more nodes")

    assert (found().info.status, steps_of(server, found())) == ("FAILED", [1, 2, 3, 4, 5])
    assert found().data.tags["recipe.max_workers"] == "7"
    assert found().data.params["max_workers"] == str(named_recipe("tiny").max_workers)


def test_an_outage_is_reported_once_costs_no_time_and_leaves_no_gap(
    start: Start, run: RunDirectory, server: MlflowServer
) -> None:
    there = settings("mlflow", "tensorboard", MLFLOW_TRACKING_URI=server.url, MLFLOW_EXPERIMENT_NAME="outage")
    monitor = start(trackers=there)
    begin(monitor)
    record(monitor, range(1, 11))
    wait_until("ten steps", lambda: run.read_tracked("mlflow").get("step") == 10, 60)

    server.stop()
    slowest = 0.0
    for step in range(11, 31):
        began = time.monotonic()
        record(monitor, range(step, step + 1))
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    wait_until("the event", lambda: monitor.flush() or "tracker-lost" in kinds(run), 60)
    wait_until("TensorBoard", lambda: run.read_tracked("tensorboard").get("step") == 30, 20)
    record(monitor, range(31, 36))
    server.start()
    wait_until("the rest", lambda: run.read_tracked("mlflow").get("step") == 35, 90)
    record(monitor, range(36, 41))
    monitor.end("finished")

    assert slowest < 1.0
    assert (kinds(run).count("tracker-lost"), kinds(run).count("tracker-back")) == (1, 1)
    client = MlflowClient(server.url)
    (found,) = client.search_runs([client.get_experiment_by_name("outage").experiment_id])
    assert steps_of(server, found) == steps_of(server, found, "gradient_norm") == ALL


def test_what_no_longer_fits_into_memory_comes_from_the_history(
    start: Start, run: RunDirectory, server: MlflowServer
) -> None:
    there = settings("mlflow", MLFLOW_TRACKING_URI=server.url, MLFLOW_EXPERIMENT_NAME="narrow", send_seconds=1.0)
    monitor = start(trackers=dataclasses.replace(there, most_waiting=15))
    begin(monitor)
    record(monitor, range(1, 31))
    monitor.worker_failed("rank 1: lost", remedy="restart")
    begin(monitor, resume_step=20)
    record(monitor, range(21, 41), attempt=2)
    monitor.flush()
    monitor.end("finished")

    client = MlflowClient(server.url)
    (found,) = client.search_runs([client.get_experiment_by_name("narrow").experiment_id])
    assert steps_of(server, found) == ALL
    assert steps_of(server, found, "gradient_norm") == list(range(26, 41))


class Silent(LoopbackServer):
    """Takes every request and answers none."""

    def serve(self, handler: BaseHTTPRequestHandler) -> None:  # noqa: ARG002
        self.closed.wait()


def test_a_server_that_never_answers_delays_neither_steps_nor_the_end(start: Start, run: RunDirectory) -> None:
    with Silent().running() as silent:
        monitor = start(trackers=settings("mlflow", end_seconds=1.0, MLFLOW_TRACKING_URI=silent.endpoint))
        began = time.monotonic()
        begin(monitor)
        record(monitor, range(1, 200))
        monitor.end("finished")
        took = time.monotonic() - began

    assert took < 15.0
    assert last_event(run)["kind"] == "tracker-lost"
    assert last_event(run)["reason"] == "mlflow lacks the end of the run, for which it was given 1 s"
    assert run.read_heartbeat()["state"] == "finished"


def test_a_damaged_file_of_a_tracker_costs_the_tracker_alone(start: Start, run: RunDirectory) -> None:
    run.storage.write(run.path("trackers", "tensorboard.json"), b"{")

    monitor = start(trackers=settings("tensorboard", end_seconds=0.5))
    begin(monitor)
    record(monitor, range(1, 11))
    wait_until("the event", lambda: monitor.flush() or "tracker-lost" in kinds(run), 20)
    monitor.end("finished")

    reason = next(event["reason"] for event in run.read_events() if event["kind"] == "tracker-lost")
    assert reason.startswith(
        "tensorboard takes no figures, and gets them later: RunError: run directory: must hold JSON"
    )
    assert run.read_heartbeat()["state"] == "finished"


def test_no_password_of_a_tracker_is_in_an_event_or_a_log(
    start: Start, run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = {"MLFLOW_TRACKING_URI": "http://user:hunter2@127.0.0.1:1", "MLFLOW_TRACKING_TOKEN": "to%20ken"}
    there = settings("mlflow", end_seconds=5.0, **secrets, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    monitor = start(trackers=there)
    begin(monitor)
    wait_until("the event", lambda: monitor.flush() or "tracker-lost" in kinds(run), 60)
    monitor.end("finished")

    written = "".join(path.read_text() for path in Path(run.url).rglob("*") if path.is_file())
    for secret in ("hunter2", "to%20ken"):
        assert secret not in written + caplog.text + repr(there)


KILLED_DRIVER = """
import os, sys, time
from monitored_runs import start_monitor
from patience import wait_until
from test_trackers import lose_a_rank, settings
from jobs.run.directory import RunDirectory
from jobs.trackers.wandb_run import FLUSH_SECONDS
from pipeline.store.storage import Storage

run = RunDirectory.at(Storage(), sys.argv[1])
lose_a_rank(start_monitor(run, trackers=settings("wandb", **{k: v for k, v in os.environ.items() if "WANDB" in k})))
wait_until("the steps", lambda: run.read_tracked("wandb").get("step") == 35, 60)
time.sleep(2 * FLUSH_SECONDS)
os._exit(9)
"""


def test_wandb_offline_has_one_id_and_every_step_once_over_attempts_and_drivers(
    start: Start, run: RunDirectory, tmp_path: Path
) -> None:
    there = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # it imports this file, too
    environ = {**os.environ, **there, "PYTHONPATH": path}
    killed = subprocess.run([sys.executable, "-c", KILLED_DRIVER, run.url], env=environ, check=False)
    assert killed.returncode == 9

    go_on(start(trackers=settings("wandb", **there)))

    before, after = offline_runs(tmp_path)
    assert before.id == after.id == run.read_tracked("wandb")["id"]
    rows = [row for row in (*before.rows, *after.rows) if "loss" in row]
    assert [row["step"] for row in rows] == ALL
    assert all({"learning_rate", "images_per_second", "gradient_norm", "world_size"} <= row.keys() for row in rows)
    assert [row["step"] for row in after.rows if "probe_knn_20" in row] == [20]
    assert (after.summary["state"], after.summary["last_step"]) == ("finished", 40)
    assert after.config["model.mask_ratio"] == 0.75
    assert "restart: rank 1: lost" in after.notes


def test_a_tracker_that_fails_within_a_process_is_opened_there_again(run: RunDirectory, tmp_path: Path) -> None:
    """W&B's own process refuses a second run of an id while the first is open."""
    environ = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    os.environ.update(environ)
    for step in (0, 5):
        tracker = KINDS["wandb"].open(TrackedRun("an-id", run, {}, environ, step))
        tracker.send([Point(step + 1, time.time(), {"loss": 0.5})], step + 1, "")
        tracker.leave()

    assert [(life.id, life.rows[0]["step"]) for life in offline_runs(tmp_path)] == [("an-id", 1), ("an-id", 6)]
