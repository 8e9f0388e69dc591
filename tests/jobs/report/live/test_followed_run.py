"""A run that is followed looks as one that is read at once, and costs less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_events import probe_events

from jobs.errors import RunError
from jobs.recipe.named_recipes import named_recipe
from jobs.report.curves import History
from jobs.report.live.followed_run import SELDOM_SECONDS, FollowedRun
from jobs.report.live.run_drawing import RunDrawing
from jobs.report.reported_run import ReportedRun
from jobs.run.directory import HISTORY_PART_STEPS, RunDirectory
from pipeline.store.storage import Storage

COMPUTE = {"step_flops": 4e12, "peak_flops_per_second": 20e12, "devices": "2 x A10 (data sheet)"}


class CountingStorage(Storage):
    """Notes what is read."""

    read_urls: list[str] = []  # noqa: RUF012  reset by the fixture

    def read(self, url: str) -> bytes:
        type(self).read_urls.append(url)
        return super().read(url)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    CountingStorage.read_urls = []
    directory = RunDirectory.of(CountingStorage(), str(tmp_path / "runs"), "first")
    directory.claim(named_recipe("tiny"))
    return directory


def row(step: int, attempt: int, **fields: Any) -> dict[str, Any]:
    figures = {"loss": 1 / step, "learning_rate": 1e-3, "world_size": 2, "step_seconds": 0.5 + 0.01 * (step % 7)}
    return {"step": step, "epoch": 0, "attempt": attempt, **figures, **fields}


def began(attempt: int, step: int, redone: int, **fields: Any) -> dict[str, Any]:
    kind = "restart" if attempt > 1 else "start"
    about = {"reason": "", "world_size": 2, "steps_redone": redone}
    return {"at_seconds": 1000.0 * attempt, "attempt": attempt, "kind": kind, "step": step, **about, **fields}


def write_attempts(run: RunDirectory) -> None:
    """Two attempts: the second redoes steps 21 to 30, of which it skips one that the first had trained."""
    run.write_history(1, 1, [row(step, 1) for step in range(1, 31)])
    run.write_events(1, [began(1, 0, 0, **COMPUTE), *probe_events({0: 0.25})])
    second = [row(step, 2, world_size=3, loss=2 / step) for step in range(21, 61)]
    second[4] |= {"loss": None, "skipped": "loss"}
    run.write_history(2, 21, second)
    run.write_events(2, [began(2, 20, 10), *probe_events({40: 0.5})])
    run.write_heartbeat({"state": "running", "step": 60, "total_steps": 90, "updated_at_seconds": 3000.0})


def assert_alike(found: ReportedRun, expected: ReportedRun) -> None:
    for name in History.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found.history, name), getattr(expected.history, name), name)
    assert found.mfu_ratio == pytest.approx(expected.mfu_ratio)
    assert (found.events, found.accuracies, found.heartbeat) == (
        expected.events,
        expected.accuracies,
        expected.heartbeat,
    )
    assert (found.faults, found.picture, found.kept_steps) == (expected.faults, expected.picture, expected.kept_steps)


def test_a_run_that_is_followed_is_as_its_report_has_it(run: RunDirectory) -> None:
    write_attempts(run)
    run.storage.write(run.path("reconstructions.png"), b"a picture")
    expected = ReportedRun.read(run)

    assert_alike(FollowedRun(run).read(), expected)
    assert len(expected.history) == 59  # that they agree is worth something
    assert expected.mfu_ratio
    run.storage.write(run.path("commits", "step-00000040.json"), b"{}")
    assert FollowedRun(run).read().kept_steps == {40}


def test_validations_of_steps_that_were_redone_are_those_of_the_last_attempt(tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path), "tuned")
    run.claim(named_recipe("tiny_finetune"))
    measured = {"validation_samples": 200, "validation_plan": "a plan"}
    run.write_history(1, 1, [row(step, 1, validation_top1=0.4, **measured) for step in (1, 2)])
    run.write_history(2, 2, [row(step, 2, validation_top1=0.6, **measured) for step in (2, 3)])

    curve = FollowedRun(run).read().accuracies

    assert [(each.step, each.accuracies["validation_top1"]) for each in curve.rows] == [(1, 0.4), (2, 0.6), (3, 0.6)]
    assert curve == ReportedRun.read(run).accuracies


def test_what_cannot_change_is_read_once(run: RunDirectory) -> None:
    seconds = [0.0]
    followed = FollowedRun(run, lambda: seconds[0])
    write_attempts(run)
    followed.read()
    CountingStorage.read_urls.clear()

    run.write_history(2, 21, [row(step, 2) for step in range(21, 71)])
    found = followed.read()

    names = [url.removeprefix(f"{run.url}/") for url in CountingStorage.read_urls]
    assert names == ["heartbeat.json", "history/0002-00000021.jsonl", "events/attempt-0002.jsonl"]
    assert len(found.history) == 70
    seconds[0] += SELDOM_SECONDS
    CountingStorage.read_urls.clear()
    followed.read()
    assert f"{run.url}/reconstructions.png" in CountingStorage.read_urls


def test_a_part_that_was_newest_is_read_again_when_it_is_not(run: RunDirectory) -> None:
    followed = FollowedRun(run)
    run.write_events(1, [began(1, 0, 0)])
    run.write_history(1, 1, [row(step, 1) for step in range(1, 11)])
    assert len(followed.read().history) == 10

    run.write_history(1, 1, [row(step, 1) for step in range(1, HISTORY_PART_STEPS + 1)])
    first = HISTORY_PART_STEPS + 1
    run.write_history(1, first, [row(first, 1)])

    assert len(followed.read().history) == first


def test_a_run_that_does_not_exist_and_one_that_did_not_start(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="must exist"):
        FollowedRun(RunDirectory.of(Storage(), str(tmp_path), "nobody")).read()

    parts: dict[str, str] = {}
    for drawn in RunDrawing(run, lambda: None).draw():
        parts |= drawn.parts
    assert "No step was recorded yet." in parts["training"]
    assert "not started" in parts["header"]


def test_the_page_of_a_run_of_many_steps_is_as_small_as_that_of_a_short_one(run: RunDirectory) -> None:
    run.write_events(1, [began(1, 0, 0, **COMPUTE)])
    steps = 100 * HISTORY_PART_STEPS
    for first in range(1, steps, HISTORY_PART_STEPS):
        run.write_history(1, first, [row(step, 1) for step in range(first, first + HISTORY_PART_STEPS)])
    beat = {"state": "running", "step": steps, "total_steps": steps, "updated_at_seconds": 3000.0}
    run.write_heartbeat(beat)
    drawing = RunDrawing(run, lambda: None)
    first_round = list(drawing.draw())
    CountingStorage.read_urls.clear()

    assert sum(len(html) for drawn in first_round for html in drawn.parts.values()) < 600_000
    assert [name for drawn in drawing.draw() for name in drawn.parts if name == "training"] == []  # nothing is new
    assert sum("/history/" in url for url in CountingStorage.read_urls) == 1
