"""What a driver meets as it starts: a port, a store and a cluster that are away, and what the one before it left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray_here import ray_here

from jobs.cluster.session import Session
from jobs.control import driver, workflow
from jobs.control.run_plan import RunPlan, plan_run
from jobs.errors import ClusterError, MonitorLivesError, OvertakenError, PortTakenError
from jobs.metrics.exporter import RunExporter
from jobs.monitor.monitor import RunMonitor
from jobs.monitor.run_memory import MonitorConfig
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import Schedule
from jobs.remote.frames import CALLER_VARIABLE
from jobs.run.directory import RunDirectory
from jobs.run.patience import persevere
from pipeline.ingest.photographs import cut_tiles
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.shard.manifest import Manifest
from pipeline.store.lease import hold_lease
from pipeline.store.storage import Storage

HELD_SECONDS = 3.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small data set."""
    folder, url = tmp_path_factory.mktemp("photographs"), str(tmp_path_factory.mktemp("data"))
    cut_tiles(folder, 16, seed=0)
    sources = find_sources(Storage(), str(folder))
    tasks = plan_shards(sources, Sharding(8))
    reports = [write_shard(Storage(), url, task) for task in tasks]
    Manifest.of(tasks, reports, sources.classes).save(Storage(), url, [])
    return url


@pytest.fixture
def laptop(tmp_path: Path) -> Session:
    """A session whose cluster is elsewhere."""
    return Session({"RAY_ADDRESS": "http://10.0.0.1:8265"}, tmp_path, None, Storage())


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port that somebody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def recipe(data: str, tmp_path: Path, port: int) -> Recipe:
    fields = {"data": data, "run_root": str(tmp_path / "runs"), "metrics_port": port}
    return named_recipe("tiny").amended({**fields, "global_batch_size": 8, "lanes": 8, "micro_batch_size": 4})


def port_of(server: socket.socket) -> int:
    port: int = server.getsockname()[1]
    return port


def released_soon(server: socket.socket) -> None:
    threading.Timer(HELD_SECONDS, server.close).start()


def test_a_port_that_is_taken_here_says_nothing_of_the_cluster(
    laptop: Session, data: str, tmp_path: Path, taken: socket.socket
) -> None:
    wanted = recipe(data, tmp_path, port_of(taken))

    assert plan_run(laptop, wanted, "first", drives=False).recipe.metrics_port == port_of(taken)
    with pytest.raises(PortTakenError, match="must be a port on which this process can listen"):
        plan_run(laptop, wanted, "first")


def test_a_driver_that_nobody_typed_waits_for_its_port(
    laptop: Session, data: str, tmp_path: Path, taken: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    released_soon(taken)
    began = time.monotonic()

    plan = plan_run(laptop, recipe(data, tmp_path, port_of(taken)), "first", is_patient=True)

    assert plan.patience_seconds == laptop.storage.retry_seconds
    assert HELD_SECONDS - 1 <= time.monotonic() - began < 30
    assert "waits up to 120 s: metrics_port" in caplog.text


@pytest.mark.parametrize(("is_patient", "retry_seconds"), [(False, 3.0), (True, 120.0)])
def test_the_store_is_asked_for_as_long_as_the_run_would(
    laptop: Session, data: str, tmp_path: Path, is_patient: bool, retry_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []
    monkeypatch.setattr(Storage, "probe", lambda self, url, write: asked.append((url, self.retry_seconds)))

    plan = plan_run(laptop, recipe(data, tmp_path, 0), "first", is_patient=is_patient)

    assert asked == [(data, retry_seconds), (plan.run.url, retry_seconds)]


def test_an_exporter_waits_for_the_port_of_one_that_ends(taken: socket.socket) -> None:
    released_soon(taken)

    exporter = RunExporter("first", "127.0.0.1", port_of(taken), patience_seconds=30)

    assert exporter.address.endswith(f":{exporter.url.split(':')[-1].split('/')[0]}")


def test_an_exporter_without_patience_says_what_is_wrong(taken: socket.socket) -> None:
    with pytest.raises(PortTakenError, match="metrics_port: must be a port on which this process can listen"):
        RunExporter("first", "127.0.0.1", port_of(taken))


def test_another_fault_of_the_address_is_not_waited_for() -> None:
    began = time.monotonic()

    with pytest.raises(OSError, match=r"assign requested address|not available"):
        RunExporter("first", "192.0.2.1", 0, patience_seconds=30)

    assert time.monotonic() - began < 10


def test_a_supervisor_is_not_started_from_elsewhere(tmp_path: Path) -> None:
    """The job of a command that was typed on another machine is that command, which it could not become again."""
    variables = {CALLER_VARIABLE: "{}", "CONVMAE_HOME": str(tmp_path)}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    command = [sys.executable, "-m", "jobs.cli.main", "pretrain", "tiny", "--supervised"]

    ended = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=False)

    assert ended.returncode == 2
    assert "error: --supervised: must be given on a node of the cluster" in ended.stderr
    assert "convmae submit" in ended.stderr


class Restarting:
    """A session whose cluster answers the third time."""

    def __init__(self) -> None:
        self.asked = 0

    def connect(self) -> None:
        self.asked += 1
        if self.asked < 3:
            raise ClusterError("RAY_ADDRESS", "must answer", "10.0.0.1:6379", "is it up?")
        raise ConnectionAbortedError("connected")


@pytest.mark.parametrize(("patience_seconds", "asked"), [(0.0, 1), (60.0, 3)])
def test_a_cluster_that_does_not_answer_is_waited_for_by_a_patient_driver_alone(
    tmp_path: Path, patience_seconds: float, asked: int
) -> None:
    tiny, session = named_recipe("tiny"), Restarting()
    run = RunDirectory.of(Storage(), str(tmp_path), "first")
    plan = RunPlan(tiny, run, Schedule.of(tiny, steps_per_epoch=1), patience_seconds=patience_seconds)

    with pytest.raises((ClusterError, ConnectionAbortedError)):
        workflow.train_here(session, plan)  # type: ignore[arg-type]

    assert session.asked == asked


@pytest.fixture(scope="module")
def cluster(token_of_this_process: str) -> Iterator[None]:
    with ray_here(token_of_this_process, num_cpus=1, namespace="convmae"):
        yield


def config_of(run: RunDirectory, port: int = 0) -> MonitorConfig:
    tiny = named_recipe("tiny")
    return MonitorConfig(
        run=run,
        schedule=Schedule.of(tiny, steps_per_epoch=1),
        global_batch_size=tiny.global_batch_size,
        max_restarts_without_progress=1,
        target_world_size=1,
        checkpoint_interval=IntervalRule.of(tiny),
        device="cpu",
        hang_seconds=60.0,
        straggler_factor=tiny.straggler_factor,
        leave_out_stragglers=tiny.leave_out_stragglers,
        host="127.0.0.1",
        metrics_port=port,
        targets_folder="",
        claim=1,
    )


def left_behind(config: MonitorConfig) -> Any:
    """The monitor of a driver that Ray has not noticed to be dead."""
    actor: Any = ray.remote(RunMonitor)
    monitor = actor.options(name=f"monitor:{config.run.url}", num_cpus=0, max_concurrency=4).remote(config)
    ray.get(monitor.status.remote())
    return monitor


def test_the_monitor_of_the_driver_before_is_ended_and_its_name_and_port_taken(cluster: None, tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path), "first")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port_of(probe)
    old = left_behind(config_of(run, port))

    with hold_lease(
        run.storage, run.path("claims"), "drives the run", on_wait=lambda _: None, keeps_number=True
    ) as claim:
        new = persevere(lambda: driver._new_monitor(run, config_of(run, port), claim), MonitorLivesError, 60)

        assert ray.get(new.status.remote())["metrics_url"].endswith(f":{port}/metrics")
        assert new._actor_id != old._actor_id
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(old.status.remote())
        ray.kill(new)


def test_a_driver_that_was_overtaken_as_it_started_ends_nobodys_monitor(cluster: None, tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path), "second")
    monitor = left_behind(config_of(run))
    folder = run.path("claims")
    with hold_lease(run.storage, folder, "drives the run", on_wait=lambda _: None, keeps_number=True) as claim:
        (tmp_path / "second" / "claims" / "claim-000002.json").write_bytes(Path(claim.url).read_bytes())

        with pytest.raises(OvertakenError, match="was taken over"):
            driver._new_monitor(run, config_of(run), claim)

    assert ray.get(monitor.status.remote())["run"] == "second"
    ray.kill(monitor)
