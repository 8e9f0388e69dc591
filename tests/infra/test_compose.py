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
AMTOOL = shutil.which("amtool")
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


def alertmanager() -> Any:
    (found,) = documents("compose/alertmanager.yml")
    return found


def test_prometheus_sends_alerts_to_the_alertmanager_beside_it() -> None:
    (prometheus,) = documents("compose/prometheus.yml")
    (target,) = prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    service = compose()["services"][name]

    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    (given,) = [option.partition("=")[2] for option in service["command"] if option.startswith("--config.file=")]
    assert f"./alertmanager.yml:{given}:ro" in service["volumes"]


def test_the_alertmanagers_webhook_is_a_secret_and_it_alone_has_a_way_out() -> None:
    document = compose()
    (receiver,) = alertmanager()["receivers"]
    (hook,) = receiver["slack_configs"]
    (secret,) = document["services"]["alertmanager"]["secrets"]

    assert hook["api_url_file"] == f"/run/secrets/{secret}" and "api_url" not in hook
    assert document["secrets"][secret]["file"].endswith(":-/dev/null}"), "it starts without one"
    assert alertmanager()["route"]["receiver"] == receiver["name"]
    assert [name for name, service in document["services"].items() if "networks" in service] == ["alertmanager"]
    networks = document["services"]["alertmanager"]["networks"]
    assert networks == sorted(networks) == ["alerts", "default"], "the first is the way out"


def test_the_alertmanager_knows_alerts_and_severities_of_the_rules() -> None:
    (rules,) = documents("prometheus/convmae.rules.yml")
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    known = {
        "alertname": {rule["alert"] for rule in alerts},
        "severity": {rule["labels"]["severity"] for rule in alerts},
    }
    matchers = [matcher for route in alertmanager()["route"]["routes"] for matcher in route["matchers"]]
    for rule in alertmanager()["inhibit_rules"]:
        matchers += rule["source_matchers"] + rule["target_matchers"]

    assert matchers
    for matcher in matchers:
        label, value = re.fullmatch(r'(\w+)="(\w+)"', matcher).groups()  # type: ignore[union-attr]
        assert value in known[label]


@pytest.mark.skipif(AMTOOL is None, reason="amtool is not installed")
@pytest.mark.parametrize(("change", "code"), [({}, 0), ({"route": {"receiver": "nobody"}}, 1), ({"inhibit": []}, 1)])
def test_amtool_accepts_the_alertmanagers_configuration_and_finds_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], code: int
) -> None:
    assert AMTOOL
    file = tmp_path / "alertmanager.yml"
    file.write_text(json.dumps(alertmanager() | change))

    checked = subprocess.run([AMTOOL, "check-config", str(file)], capture_output=True, text=True, check=False)

    assert checked.returncode == code, checked.stdout + checked.stderr


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
