from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.cluster.diagnosis import (
    Finding,
    clock_skew,
    exit_code,
    finding_lines,
    node_findings,
    ray_settings,
    read_speed,
    reduce_failure,
    reduce_speed,
    same_versions,
)
from jobs.cluster.node_probe import Disk, NodeFacts

GOOD = NodeFacts(
    host="one",
    versions={"python": "3.11.9", "torch": "2.13.0"},
    cpus=16,
    memory_bytes=64 * 10**9,
    shared_memory_bytes=8 * 10**9,
    disks=[Disk("/tmp", 500 * 10**9, 10**12, writable=True)],
    gpus=["NVIDIA H100, 570.1"],
)


def levels(node: NodeFacts, *, wants_gpu: bool = True) -> dict[str, str]:
    return {finding.check: finding.level for finding in node_findings(node, wants_gpu=wants_gpu)}


def test_a_good_node_has_nothing_to_fix() -> None:
    assert set(levels(GOOD).values()) == {"ok"}
    assert not any(finding.remedy for finding in node_findings(GOOD, wants_gpu=True))


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        ({"shared_memory_bytes": 64 * 2**20}, "/dev/shm", "warning"),
        ({"disks": [Disk("/tmp", 10**9, 10**12, writable=True)]}, "disk", "warning"),
        ({"disks": [Disk("/scratch", 500 * 10**9, 10**12, writable=False)]}, "disk", "failed"),
        ({"gpus": []}, "GPUs", "failed"),
    ],
)
def test_a_fault_of_a_node_is_found_with_a_remedy(change: dict[str, object], check: str, level: str) -> None:
    found = {finding.check: finding for finding in node_findings(replace(GOOD, **change), wants_gpu=True)}  # type: ignore[arg-type]

    assert found[check].level == level
    assert found[check].remedy
    assert found[check].node == "one"


def test_each_slow_setting_is_named_with_the_value_to_set() -> None:
    plain = {"health_check_period_ms": 3000, "health_check_timeout_ms": 10_000, "health_check_failure_threshold": 5}

    found = list(ray_settings(plain))

    assert [finding.level for finding in found] == ["warning", "warning"]
    after = "Ray declares a host that falls silent dead after 65 s"
    assert [finding.detail for finding in found] == [
        f"health_check_period_ms is 3000: {after}", f"health_check_timeout_ms is 10000: {after}",
    ]  # fmt: skip
    assert "RAY_health_check_period_ms=1000" in found[0].remedy
    assert "RAY_health_check_timeout_ms=5000" in found[1].remedy
    (good,) = ray_settings({**plain, "health_check_period_ms": 500, "health_check_timeout_ms": 1000})
    assert (good.level, good.remedy) == ("ok", "")


def test_a_node_without_a_gpu_is_fine_for_a_run_without_one() -> None:
    assert levels(replace(GOOD, gpus=[]), wants_gpu=False)["GPUs"] == "skipped"


def test_a_differing_version_is_named_with_its_node_and_the_version_here() -> None:
    other = replace(GOOD, host="two", versions={"python": "3.11.9", "torch": "2.12.0"})

    (finding,) = same_versions(GOOD, [GOOD, other])

    assert (finding.level, finding.node) == ("failed", "two")
    assert finding.detail == "torch is 2.12.0, here 2.13.0"
    assert [finding.level for finding in same_versions(GOOD, [GOOD, GOOD])] == ["ok"]


def test_a_missing_package_is_a_differing_version() -> None:
    (finding,) = same_versions(GOOD, [replace(GOOD, host="two", versions={"python": "3.11.9"})])

    assert finding.detail == "torch is -, here 2.13.0"


@pytest.mark.parametrize(
    ("skew", "uncertainty", "level"),
    [
        (0.2, 0.01, "ok"),
        (-3.0, 0.01, "warning"),
        (3.0, 2.5, "ok"),  # within what is known, it may be right
        (-900.0, 0.01, "failed"),
    ],
)
def test_a_clock_is_judged_by_what_is_certain(skew: float, uncertainty: float, level: str) -> None:
    assert clock_skew("one", skew, uncertainty).level == level


def test_slow_links_are_warnings_that_say_what_they_allow() -> None:
    slow = read_speed("one", 11e6)
    assert slow.level == "warning"
    assert "100 images/s" in slow.detail
    assert read_speed("one", 900e6).level == "ok"
    assert reduce_speed("gloo", 2, 1e6).level == "warning"
    assert reduce_speed("nccl", 2, 1e9).level == "ok"


def test_ranks_that_do_not_reach_each_other_are_a_failure() -> None:
    finding = reduce_failure("gloo", 3, RuntimeError("long story\nconnection refused"))

    assert (finding.level, finding.detail) == ("failed", "gloo over 3 ranks: connection refused")
    assert "port" in finding.remedy


def test_only_failures_set_the_exit_code() -> None:
    findings = [Finding("a", "ok", ""), Finding("b", "warning", "", "fix it"), Finding("c", "skipped", "")]
    assert exit_code(findings) == 0
    assert exit_code([*findings, Finding("d", "failed", "", "fix it")]) == 1


def test_a_finding_is_one_line_and_its_remedy_another() -> None:
    lines = list(finding_lines([Finding("clock", "warning", "off", "set it", "one"), Finding("store", "ok", "fine")]))

    assert len(lines) == 3
    assert lines[0].split() == ["WARNING", "clock", "one:", "off"]
    assert lines[1].strip() == "-> set it"
