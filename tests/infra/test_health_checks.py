"""The health checks of Ray's head, as the cluster files set them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from manifests import documents

from jobs.cluster.diagnosis import ray_settings
from jobs.cluster.node_probe import RAY_SETTINGS


def kuberay() -> Mapping[str, str]:
    (found,) = documents("kuberay/raycluster.yaml")
    (head,) = found["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in head["env"]}


def compose() -> Mapping[str, str]:
    (found,) = documents("compose/compose.yml")
    environment: Mapping[str, str] = found["services"]["ray-head"]["environment"]
    return environment


def ray_up() -> Mapping[str, str]:
    (found,) = documents("ray-up/aws.yaml")
    return dict(re.findall(r"^--env (\w+)=(\S+)$", "\n".join(found["docker"]["head_run_options"]), re.MULTILINE))


@pytest.mark.parametrize("environment", [kuberay(), compose(), ray_up()], ids=["kuberay", "compose", "ray-up"])
def test_the_head_is_started_with_settings_that_doctor_finds_fast_enough(environment: Mapping[str, str]) -> None:
    prefix = "RAY_health_check_"
    set_there = {
        name.removeprefix("RAY_"): int(value) for name, value in environment.items() if name.startswith(prefix)
    }

    assert set_there == RAY_SETTINGS
    (finding,) = ray_settings(set_there)
    assert (finding.level, finding.detail) == ("ok", "Ray declares a host that falls silent dead after 36 s")


def test_a_head_that_is_cut_off_for_fifteen_seconds_has_not_given_up_when_tcp_tries_again() -> None:
    # Linux doubles the time between tries, from 0.2 s on: the first try after the 15th second.
    tries, wait = 0.0, 0.2
    while tries <= 15:
        tries += wait
        wait *= 2

    each = (RAY_SETTINGS["health_check_period_ms"] + RAY_SETTINGS["health_check_timeout_ms"]) / 1000
    assert RAY_SETTINGS["health_check_failure_threshold"] * each > tries + each
