"""The compose file, started by Docker Compose on Podman with the real image: from nothing to a monitored run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from container_engine import Engine, compose_command
from image_build import BASE
from manifests import INFRA
from patience import wait_until
from prometheus_server import PROMETHEUS
from testbed import TILES, small_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not compose_command(), reason="Docker Compose 2 is not installed"),
    pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed"),
]

PUBLISHED_PROMETHEUS = "docker.io/prom/prometheus:v2.55.1"
DATA = "s3://convmae/datasets/photographs"
RUNS = "s3://convmae/runs"
CHECKED = ("s3", "ray-head")
"""Services with a health check. Podman leaves starting it to systemd, so that the test starts it."""
CHECK_SECONDS = 15
CUT = f"import pathlib as l, pipeline.ingest.photographs as p; p.cut_tiles(l.Path('/scratch/p'), {TILES}, 0)"


@dataclass(frozen=True)
class Composed:
    """The compose file on an engine, and its command."""

    engine: Engine
    settings: Path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `docker compose` and return at once."""
        file = INFRA / "compose" / "compose.yml"
        command = [*compose_command(), f"--env-file={self.settings}", f"--file={file}", *arguments]
        environment = {**os.environ, "DOCKER_HOST": self.engine.socket}
        out, err = subprocess.PIPE, subprocess.STDOUT
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err, text=True)

    def __call__(self, *arguments: str, seconds: float = 600.0) -> str:
        """Run it to its end; returns what it printed."""
        process = self.start(*arguments)
        out, _ = process.communicate(timeout=seconds)
        assert process.returncode == 0, f"{arguments} ended with {process.returncode}\n{out}"
        return out

    def head(self, *command: str) -> str:
        """What a command prints in the container of Ray's head."""
        return self("exec", "-T", "ray-head", *command)

    def asked(self, query: str) -> list[dict[str, Any]]:
        """What the stack's Prometheus answers, on the port that is published on the machine's loopback address."""
        url = f"http://127.0.0.1:9090/api/v1/query?query={quote(query)}"
        # The engine's own network is where its ports are published.
        inside = ["nsenter", f"--target={self.engine.server.pid}", "--net", "wget", "-qO-", url]
        said = subprocess.run(inside, capture_output=True, text=True, check=False)
        return list(json.loads(said.stdout)["data"]["result"]) if said.returncode == 0 else []


@pytest.fixture(scope="module")
def composed(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """All services, up and healthy, with two Ray workers; except Grafana, which is in no package."""
    stand_in_for_prometheus(engine, tmp_path_factory.mktemp("prometheus"))
    settings = tmp_path_factory.mktemp("settings") / "env"
    names = ("S3_ACCESS_KEY", "S3_SECRET_KEY", "RAY_AUTH_TOKEN", "GRAFANA_PASSWORD")
    settings.write_text("".join(f"{name}={os.urandom(20).hex()}\n" for name in names))
    composed = Composed(engine, settings)
    starting = composed.start(
        "up", "--detach", "--no-build", "--scale=ray-worker=2", "s3", "ray-head", "ray-worker", "prometheus"
    )
    deadline = time.monotonic() + 300
    while starting.poll() is None and time.monotonic() < deadline:
        for service in CHECKED:
            with contextlib.suppress(subprocess.TimeoutExpired):  # Podman itself does not limit it
                engine.podman("healthcheck", "run", f"convmae-{service}-1", seconds=CHECK_SECONDS, check=False)
        time.sleep(1)
    out, _ = starting.communicate(timeout=10)
    assert starting.returncode == 0, out
    yield composed
    composed("down", "--volumes", "--timeout=5")


def stand_in_for_prometheus(engine: Engine, folder: Path) -> None:
    """An image of this machine's Prometheus, with the published one's name, user and folder."""
    assert PROMETHEUS
    shutil.copy(PROMETHEUS, folder / "prometheus")
    (folder / "Dockerfile").write_text(
        f"FROM {BASE}\n"
        "COPY prometheus /bin/prometheus\n"
        "RUN mkdir /prometheus && chown nobody:nogroup /prometheus\n"
        'USER nobody\nWORKDIR /prometheus\nENTRYPOINT ["/bin/prometheus"]\n'
    )
    built = engine.build(folder / "Dockerfile", folder, PUBLISHED_PROMETHEUS)
    assert built.returncode == 0, built.stderr


def test_containers_have_no_rights_and_one_init(composed: Composed) -> None:
    for service in ("s3", "ray-head", "ray-worker"):
        script = "cat /proc/1/comm; id -u; grep -E 'CapBnd|NoNewPrivs' /proc/self/status"
        said = composed("exec", "-T", service, "bash", "-c", script).split()

        assert said == ["tini", "10001", "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]


def test_a_name_resolves_to_one_address_everywhere(composed: Composed) -> None:
    """Ranks, exporters and Prometheus find each other by name, and listen on their own address."""
    seen = {composed("exec", "-T", name, "getent", "hosts", "ray-head").split()[0] for name in ("s3", "ray-worker")}
    own = composed.head("python", "-c", "import ray.util as u; print(u.get_node_ip_address())").split()

    assert seen == set(own)


def test_a_cluster_of_the_compose_file_trains_and_is_watched(composed: Composed) -> None:
    def until(what: str, query: str) -> None:
        wait_until(what, lambda: bool(composed.asked(query)), 300)

    until("Ray's three nodes", "count(count by (ip) (ray_node_mem_used)) == 3")
    doctor = composed.head("convmae", "doctor", "--store", RUNS)
    assert "3 nodes" in doctor
    assert "all-reduce       gloo over 3 ranks" in doctor

    composed.head("python", "-c", f"from pathlib import Path; Path('/scratch/p').mkdir(); {CUT}")
    assert f"{TILES} images" in composed.head("convmae", "shard", "/scratch/p", DATA, "--samples-per-shard", "40")
    fields = {"run_root": RUNS, "epochs": 1000, "max_workers": 2, "metrics_port": 9400, "checkpoint_every_steps": 20}
    composed.head("convmae", "submit", *small_recipe(DATA, **fields), "--run", "first")

    until("a run of two ranks", 'convmae_world_size_ranks{run="first"} == 2')
    until("a checkpoint", 'convmae_checkpoint_timestamp_seconds{run="first"} > 0')
    composed.head("convmae", "stop", "first", "--run-root", RUNS)
    status = json.loads(composed.head("convmae", "status", "first", "--run-root", RUNS, "--json"))
    assert status["state"] == "stopped"
