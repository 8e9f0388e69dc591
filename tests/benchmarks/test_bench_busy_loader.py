from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_busy_loader
import pytest
from bench_busy_loader import Found, Launcher, report
from loader_material import make_material

FOUND = Found(
    images_alone=600.0,
    images_beside=590.0,
    cpu_ms_alone=3.0,
    launches_alone=50_000.0,
    step_alone=0.05,
    step_beside=0.051,
    dispatch_alone=2.5e-6,
    dispatch_beside=2.6e-6,
    dispatch_mean_beside=2.7e-6,
    other_work=0.0,
)


def test_the_verdict_is_that_of_the_medians_of_processes() -> None:
    starved = replace(FOUND, images_beside=250.0, step_beside=0.1)

    lines = report({"threads": [starved] * 3, "processes": [FOUND, FOUND, starved]}, cores=8)

    assert "threads: keeps 42% of its speed, steps slower by +100.0%" in "\n".join(lines)
    assert lines[-1] == "goal of processes: keeps >= 90%, steps slower by <= 3%: reached"


@pytest.mark.parametrize("change", [{"images_beside": 530.0}, {"step_beside": 0.052}])
def test_a_goal_that_is_missed_is_said(change: dict[str, float]) -> None:
    lines = report({"threads": [FOUND], "processes": [replace(FOUND, **change)]}, cores=8)

    assert any(line.endswith("NOT reached") for line in lines)


def test_what_spoils_the_figures_is_said() -> None:
    lines = report({"threads": [FOUND], "processes": [replace(FOUND, other_work=0.5)]}, cores=1)

    assert "other work took up to 50% of the machine: measure again without it" in lines
    assert lines[-1].startswith("one core")


def test_fewer_launches_have_more_python_between_them() -> None:
    often, seldom = Launcher(100_000), Launcher(5_000)

    assert often.turns < seldom.turns
    assert often.launches > seldom.launches


@pytest.mark.parametrize("side", ["threads", "processes"])
def test_a_side_is_measured_in_a_process_of_its_own(tmp_path: Path, side: str) -> None:
    shards = make_material(None, 256, tmp_path).shards
    command = [sys.executable, bench_busy_loader.__file__, "--measure", shards, side, "--seconds", "0.5"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)

    found = Found(**json.loads(done.stdout))
    assert found.images_alone > 0 and found.cpu_ms_alone > 0
    assert found.images_beside >= 0  # none by threads, where the main thread keeps the lock for half a second
    assert 0 < found.dispatch_alone < found.step_alone
