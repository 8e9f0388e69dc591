"""The compose file as Docker's own command reads it, which needs no engine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from container_engine import compose_command
from manifests import INFRA

FOLDER = INFRA / "compose"
SECRETS = ("S3_ACCESS_KEY", "S3_SECRET_KEY", "RAY_AUTH_TOKEN", "GRAFANA_PASSWORD")


pytestmark = pytest.mark.skipif(not compose_command(), reason="Docker Compose 2 is not installed")


def read_by_compose(folder: Path, *files: str, without: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """What `docker compose config` makes of the files, with every secret but one filled in."""
    settings = folder / "env"
    filled = {name: f"filled-in-{name.lower()}" for name in SECRETS if name != without} | more
    settings.write_text("".join(f"{name}={value}\n" for name, value in filled.items()))
    chosen = [option for file in files for option in ("--file", file)]
    command = [*compose_command(), "--env-file", str(settings), *chosen, "config", "--format", "json"]
    clean = {key: value for key, value in os.environ.items() if key not in (*SECRETS, "BASE_IMAGE", "HEAD_CPUS")}
    return subprocess.run(command, env=clean, cwd=FOLDER, capture_output=True, text=True, check=False)


def services_of(read: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The services that Compose would start."""
    assert read.returncode == 0, read.stderr
    assert not read.stderr  # it warns of what it ignores
    services: dict[str, Any] = json.loads(read.stdout)["services"]
    return services


def test_compose_reads_the_file_and_fills_it_in(tmp_path: Path) -> None:
    services = services_of(read_by_compose(tmp_path, "compose.yml", HEAD_CPUS="3"))

    assert set(services) == {"s3", "ray-head", "ray-worker", "prometheus", "alertmanager", "grafana"}
    for name in ("s3", "ray-head", "ray-worker"):
        assert services[name]["environment"]["AWS_SECRET_ACCESS_KEY"] == "filled-in-s3_secret_key"
        build = services[name]["build"]
        assert (Path(build["context"]) / build["dockerfile"]).is_file()
    assert "--num-cpus=3" in services["ray-head"]["command"]
    assert services["ray-head"]["depends_on"]["s3"]["condition"] == "service_healthy"
    mounts = [volume for service in services.values() for volume in service.get("volumes", [])]
    assert all(Path(mount["source"]).exists() for mount in mounts if mount["type"] == "bind")


def test_with_gpus_only_the_worker_has_another_base_and_another_image(tmp_path: Path) -> None:
    """With two bases under one name, chance would decide which one a service gets."""
    services = services_of(read_by_compose(tmp_path, "compose.yml", "compose.gpu.yml"))

    built = {name: service for name, service in services.items() if "build" in service}
    bases: dict[str, set[str]] = {}
    for service in built.values():
        bases.setdefault(service["image"], set()).add(service["build"]["args"]["BASE_IMAGE"])
    assert all(len(found) == 1 for found in bases.values()), bases
    assert "cuda" in built["ray-worker"]["build"]["args"]["BASE_IMAGE"]
    (device,) = built["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in built["ray-head"]


@pytest.mark.parametrize("secret", SECRETS)
def test_compose_refuses_a_secret_that_is_missing(tmp_path: Path, secret: str) -> None:
    read = read_by_compose(tmp_path, "compose.yml", without=secret)

    assert read.returncode != 0
    assert secret in read.stderr
    assert "copy .env.example to .env" in read.stderr


def test_compose_refuses_a_file_with_a_mistake(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yml"
    wrong.write_text("services: {ray-head: {depends_on: {s3: {condition: service_ready}}}}")

    read = read_by_compose(tmp_path, "compose.yml", str(wrong))

    assert read.returncode != 0
    assert "service_ready" in read.stderr or "condition" in read.stderr
