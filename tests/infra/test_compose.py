"""The compose file and the image, as far as they can be checked without a container engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from manifests import INFRA, ROOT, SCHEMAS, changed, documents, schema_errors
from prometheus_server import PROMTOOL

COMPOSE = json.loads((SCHEMAS / "compose" / "compose-spec.json").read_text())
DOCKERFILE = INFRA / "docker" / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


def compose() -> Any:
    (found,) = documents("compose/compose.yml")
    return found


@pytest.mark.parametrize("name", ["compose.yml", "compose.gpu.yml"])
def test_a_compose_file_satisfies_the_specification(name: str) -> None:
    (document,) = documents(f"compose/{name}")

    assert schema_errors(COMPOSE, document) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("services", "s3", "volume"), []),
        (("services", "ray-head", "restart"), 3),
        (("services", "ray-head", "depends_on", "s3", "condition"), "service_ready"),
        (("services", "grafana", "ports"), "3000"),
        (("volume",), {}),
    ],
)
def test_the_specification_detects_what_is_wrong(place: tuple[Any, ...], value: Any) -> None:
    assert schema_errors(COMPOSE, changed(compose(), place, value))


def test_ports_are_published_on_loopback_only() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_are_pinned_and_secrets_come_from_the_environment() -> None:
    text = (INFRA / "compose" / "compose.yml").read_text()
    example = (INFRA / "compose" / ".env.example").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))

    assert required == set(re.findall(r"^(\w+)=$", example, flags=re.MULTILINE))  # named there, without a value
    for service in compose()["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for name, value in service.get("environment", {}).items():
            if re.search("SECRET|TOKEN|PASSWORD|KEY_ID", name):
                assert value.startswith("${"), name


def test_mounted_files_exist() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (INFRA / "compose" / source).exists(), source
            else:
                assert source in compose()["volumes"]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    assert PROMTOOL
    for folder in ("compose", "local"):
        place = tmp_path / folder
        place.mkdir()
        shutil.copy(INFRA / folder / "prometheus.yml", place)
        shutil.copy(INFRA / "prometheus" / "convmae.rules.yml", place)
        checked = subprocess.run(
            [PROMTOOL, "check", "config", str(place / "prometheus.yml")], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_grafana_is_provisioned_with_mounted_files() -> None:
    (boards,) = documents("grafana/provisioning/dashboards/convmae.yml")
    (sources,) = documents("grafana/provisioning/datasources/prometheus.yml")
    grafana = compose()["services"]["grafana"]

    assert f"../grafana/dashboards:{boards['providers'][0]['options']['path']}:ro" in grafana["volumes"]
    assert sources["datasources"][0]["url"] == "${PROMETHEUS_URL}"
    assert "PROMETHEUS_URL" in grafana["environment"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (INFRA / "grafana" / "dashboards" / Path(home).name).exists()


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_the_dockerfile_is_clean(tmp_path: Path) -> None:
    assert HADOLINT
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace("USER 10001", "USER root") + "\nUSER root\n")

    assert subprocess.run([HADOLINT, str(DOCKERFILE)], check=False).returncode == 0
    assert subprocess.run([HADOLINT, str(worse)], check=False, capture_output=True).returncode == 1


def test_the_image_gets_all_that_the_package_needs_and_nothing_else() -> None:
    ignore = (INFRA / "docker" / "Dockerfile.dockerignore").read_text().split()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = set(" ".join(re.findall(r"^COPY --chown=\S+ (.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)).split())

    assert ignore[0] == "*"  # secrets, data and history stay out
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
