"""A driver that is started again waits for what went away with the one before it; a RayJob has such a driver."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import pytest
import yaml
from followed_runs import SPREAD, has_trained, made_dataset
from manifests import INFRA
from patience import done, wait_until
from ray_nodes import RAY, Cluster, free_port, ray_cluster
from testbed import losses, small_recipe

from jobs.run.directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

PATIENCE_SECONDS = 480
STORE_AWAY_SECONDS = 20
PORT_HELD_SECONDS = 8
WAITS_FOR_STORE = "failed (EndpointConnectionError"
MOST_DOWN_SECONDS = 170
"""Less than the three minutes for which Ray Train keeps nodes for a controller that has died."""
FIELDS = {**SPREAD, "max_workers": 1}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and one node of one CPU."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add()
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a data set."""
    return made_dataset(cluster, tmp_path_factory.mktemp("photographs"))


def fields_of(cluster: Cluster, data: str, **fields: object) -> Sequence[str]:
    """Recipe and fields, as they are typed."""
    return small_recipe(data, **{**FIELDS, "run_root": f"{cluster.s3.url}/runs", **fields})


def ray_job(cluster: Cluster, command: str, *words: str) -> str:
    """Ray's own command; returns what it printed."""
    address = f"--address=http://127.0.0.1:{cluster.ports['dashboard']}"
    options = {"env": cluster.environment(), "capture_output": True, "text": True, "timeout": 120}
    ended: Any = subprocess.run([*RAY, "job", command, address, *words], check=True, **options)
    return str(ended.stdout)


def has_ended(status: str) -> bool:
    """Whether a job has, by what `ray job status` prints."""
    return any(state in status.lower() for state in ("succeeded", "failed", "stopped"))


def driver_of(run: RunDirectory) -> psutil.Process | None:
    """The process that drives a run now; its supervisor has the URL in its words as well."""
    found = [process for process in psutil.process_iter(["cmdline"]) if run.url in (process.info["cmdline"] or ())]
    return next((process for process in found if "drive" in process.info["cmdline"]), None)


def kill_driver(run: RunDirectory) -> None:
    """SIGKILL, as the out-of-memory killer does."""
    process = driver_of(run)
    assert process, "it runs"
    os.kill(process.pid, signal.SIGKILL)


def test_the_rayjob_goes_on_when_its_driver_is_killed_while_the_store_is_away(cluster: Cluster, data: str) -> None:
    """The very words of the manifest, with a recipe for seconds in place of the one for days."""
    (manifest,) = yaml.safe_load_all((INFRA / "kuberay" / "rayjob.yaml").read_text())
    words = [word for word in shlex.split(manifest["spec"]["entrypoint"]) if "=" not in word]
    assert words[:3] == ["convmae", "pretrain", "convmae_base"] and "--supervised" in words
    port, max_steps = free_port(), 60
    fields = fields_of(cluster, data, metrics_port=port, max_steps=max_steps)
    entrypoint = [*words[:2], fields[0], *words[3:], *fields[1:]]
    run = cluster.run(words[words.index("--run") + 1])

    ray_job(cluster, "submit", "--no-wait", "--submission-id=first", "--", *entrypoint)
    has_trained(run, 1, after=15)
    cluster.s3.kill()
    kill_driver(run)
    away_until = time.monotonic() + STORE_AWAY_SECONDS
    wait_until("a driver that waits", lambda: WAITS_FOR_STORE in ray_job(cluster, "logs", "first"), 100)
    time.sleep(max(0.0, away_until - time.monotonic()))
    cluster.s3.start()
    has_trained(run, 2, after=30)
    kill_driver(run)  # and its monitor has the port, until it ends
    wait_until("the end", lambda: run.read_heartbeat().get("state") == "finished", PATIENCE_SECONDS)
    wait_until("the job's end", lambda: has_ended(ray_job(cluster, "status", "first")), PATIENCE_SECONDS)

    log = ray_job(cluster, "logs", "first")
    assert "succeeded" in ray_job(cluster, "status", "first").lower(), log
    assert len(losses(run)) == max_steps
    starts = [event for event in run.read_events() if event["kind"] in ("start", "restart")]
    assert [event["reason"] for event in starts] == ["new run", *["resumed by a new driver"] * 2]
    assert log.count("the driver was killed (SIGKILL); starting it again") == 2
    down = [event["down_seconds"] for event in run.read_events() if event["kind"] == "recovered"]
    assert len(down) == 2
    assert max(down) < MOST_DOWN_SECONDS, "nothing is kept for a controller that was killed"

    ray_job(cluster, "submit", "--submission-id=second", "--", *entrypoint)  # the manifest, applied again
    assert f"{run.name} is finished" in ray_job(cluster, "logs", "second")


def test_a_port_that_is_taken_is_waited_for_where_the_driver_runs_and_not_where_submit_is_typed(
    cluster: Cluster, data: str
) -> None:
    port = free_port()
    run = cluster.run("port")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done(cluster.convmae("submit", *fields_of(cluster, data, metrics_port=port), "--run", run.name))
        rule = "must be a port on which this process can listen (Address already in use)"
        words = f"waits up to 120 s: metrics_port: {rule}"
        wait_until("a driver that waits", lambda: words in ray_job(cluster, "logs", "port-a1"), PATIENCE_SECONDS)
        time.sleep(PORT_HELD_SECONDS)
        assert not run.read_heartbeat()

    has_trained(run, 1, after=1)
    assert run.read_heartbeat()["metrics_url"].endswith(f":{port}/metrics")
    done(cluster.convmae("stop", run.url))
