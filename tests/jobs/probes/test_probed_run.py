"""Probes beside a run as a user starts it, on real S3 and a real cluster."""

from __future__ import annotations

import json

import psutil
import pytest
from patience import wait_until
from testbed import TILES, Command, family, is_consolidated, processes, small_recipe

from jobs.run.probe_rows import PROBE_NAMES, ProbeCurve

STEPS_PER_EPOCH = TILES // 12
EPOCHS = 4
FIELDS = {"probes": True, "epochs": EPOCHS, "warmup_epochs": 1, "milestone_epochs": [1], "keep_checkpoints": 1}


def probed(convmae: Command) -> list[psutil.Process]:
    return processes("ray::ProbeProcess", family(convmae.stack))


@pytest.mark.slow
def test_accuracies_are_those_that_the_command_gives_for_each_step(convmae: Command, data: str) -> None:
    """A minute."""
    fields = {**FIELDS, "probe_epochs": 2, "keep_checkpoints": EPOCHS}  # an epoch takes less time than copying weights
    out, _ = convmae("submit", *small_recipe(data, **fields), "--run", "probed", "--follow")
    assert f"probed: finished at step {EPOCHS * STEPS_PER_EPOCH}" in out

    run = convmae.run("probed")
    rows = ProbeCurve.of(run.read_events()).rows
    assert [row.epoch for row in rows] == [0, 1, 2, 4]
    assert [row.step for row in rows] == [epoch * STEPS_PER_EPOCH for epoch in (0, 1, 2, 4)]
    for row, words in ((rows[0], ("random", "--recipe", "tiny", *small_recipe(data)[2:])), (rows[-1], ("probed",))):
        report = json.loads(convmae("evaluate", *words, "--data", data, "--samples", "10000", "--json", "-")[0])
        assert list(row.accuracies.values()) == [each["top1"]["accuracy"] for each in report["results"]]
        assert row.tested == report["test"]["samples"]
    assert not run.storage.list_files(run.path("probes")), "an empty folder may be listed for a while"
    assert [is_consolidated(run, row.step) for row in rows[1:]] == [True, False, True]
    history = [json.loads(line) for line in convmae("history", "probed", "--json")[0].splitlines()]
    assert [row["step"] for row in history if "accuracies" in row] == [row.step for row in rows[1:]]
    assert set(history[-1]["accuracies"]) == set(PROBE_NAMES)
    shown = dict(line.split(None, 1) for line in convmae("status", "probed")[0].splitlines() if " " in line)
    assert f"kNN, k = 20: {rows[-1].accuracies['knn_20']:.1%}" in shown["accuracy"]
    assert "before training" in shown["accuracy"]
    assert b"random weights" in run.storage.read(run.path("report.html"))


@pytest.mark.slow
def test_a_probe_that_is_killed_is_reported_made_again_and_stops_nothing(convmae: Command, data: str) -> None:
    """A minute."""
    fields = small_recipe(data, **FIELDS)
    process = convmae.start("submit", *fields, "--run", "shot", "--follow")
    wait_until("a probe", lambda: bool(probed(convmae)) or process.poll() is not None, 200)
    (victim,) = probed(convmae)
    victim.kill()
    _, err = process.communicate(timeout=300)

    assert process.returncode == 0, err
    run = convmae.run("shot")
    events = run.read_events()
    failures = [event for event in events if event["kind"] == "probe-failed"]
    assert len(failures) == 1
    assert "process died" in failures[0]["reason"] and "tried again" in failures[0]["reason"]
    assert [event["kind"] for event in events].count("restart") == 0
    assert [row.epoch for row in ProbeCurve.of(events).rows] == [0, 1, 4]
    assert run.read_heartbeat()["probe_failures_total"] == 1
