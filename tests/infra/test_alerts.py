from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_server import PROMTOOL

from jobs.metrics.exporter import COUNTERS, GAUGES, KNOWN_LABELS, LABELLED_COUNTERS, PROBE_GAUGES, RANK_GAUGES

ROOT = Path(__file__).parents[2]
RULES = ROOT / "infra" / "prometheus" / "convmae.rules.yml"
CASES = ROOT / "infra" / "prometheus" / "convmae.rules_test.yml"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def promtool(*arguments: str, folder: Path = RULES.parent) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL
    return subprocess.run([PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_alerts_fire_when_they_must_and_at_no_other_time() -> None:
    checked = promtool("check", "rules", RULES.name)
    tried = promtool("test", "rules", CASES.name)

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert tried.returncode == 0, tried.stdout + tried.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    expected: dict[str, set[bool]] = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for evaluation in case["alert_rule_test"]:
            expected.setdefault(evaluation["alertname"], set()).add(bool(evaluation["exp_alerts"]))

    assert expected == {alert["alert"]: {True, False} for alert in alerts()}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize("expression", ["vector(0) > 1", "vector(1)"])
def test_the_cases_detect_alerts_that_never_or_always_fire(expression: str, tmp_path: Path) -> None:
    changed = yaml.safe_load(RULES.read_text())
    for group in changed["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expression if "alert" in rule else rule["expr"]
    (tmp_path / RULES.name).write_text(yaml.safe_dump(changed))
    (tmp_path / CASES.name).write_text(CASES.read_text())

    assert promtool("test", "rules", CASES.name, folder=tmp_path).returncode != 0


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_links_to_its_section_which_says_what_to_do(alert: dict[str, Any]) -> None:
    path, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    sections = re.split(r"^#{2,4} ", (ROOT / path).read_text(), flags=re.MULTILINE)[1:]
    (section,) = (text for text in sections if text.partition("\n")[0].lower() == anchor)

    assert anchor == alert["alert"].lower()
    for part in ("**Means.**", "**Look at.**", "**Do.**"):
        assert part in section
    assert alert["labels"]["severity"] in ("critical", "warning")


def test_there_is_no_section_of_an_alert_that_is_gone() -> None:
    headings = set(re.findall(r"^### (Convmae\w+)$", (ROOT / "docs" / "runbook.md").read_text(), flags=re.MULTILINE))

    assert headings == {alert["alert"] for alert in alerts()}


def test_rules_query_series_that_are_served() -> None:
    """A misspelt name would parse, and never fire."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    foreign = {"DCGM_FI_DEV_XID_ERRORS"}
    served = {f"convmae_{name}_total" for name in (*COUNTERS, *LABELLED_COUNTERS)}
    served |= {name for name, _ in GAUGES.values()} | {f"convmae_rank_{name}" for name in RANK_GAUGES}
    served |= {f"convmae_probe_{name}_ratio" for name in PROBE_GAUGES}
    for rule in rules():
        names = set(re.findall(r"\b(?:convmae|DCGM)[\w:]+", rule["expr"]))
        assert names <= recorded | foreign | served, rule["expr"]


def test_a_cause_that_an_alert_queries_has_a_series_from_the_start() -> None:
    """`increase` does not see a series that appears with its first failure."""
    for rule in rules():
        for cause in re.findall(r'cause="(\w+)"', rule["expr"]):
            assert cause in KNOWN_LABELS["failures"]
