"""Which steps of a run are probed, in what order, and what becomes of their weights."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until
from probe_events import probe_event
from zero_material import commit_state, random_material

from jobs.control.milestones import MilestoneConsolidator
from jobs.errors import EvaluationError, ProbeDiedError
from jobs.probes.probe_plan import RunProbes
from jobs.probes.prober import Prober
from jobs.probes.run_probe import ProbedData, ProbedWeights
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.schedule import Schedule
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

RECIPE = named_recipe("tiny").amended({"probe_epochs": 2, "milestone_epochs": [3], "epochs": 6})
SCHEDULE = Schedule.of(RECIPE, steps_per_epoch=1)
MATERIAL = random_material(500)
PROBES = RunProbes(ProbedData("anywhere"), "a plan", RECIPE, SCHEDULE)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.of(Storage(retry_seconds=1), str(tmp_path), "first")
    run.claim(RECIPE)
    return run


def commit(run: RunDirectory, step: int) -> None:
    commit_state(run, RECIPE, MATERIAL, step=step, stage=1, world_size=2, milestone=step == 3)


class Bench:
    """What measures weights here, as a test lets it, and what the monitor was told."""

    def __init__(self, run: RunDirectory, *, faults: list[Exception] | None = None, is_open: bool = True) -> None:
        self.run, self.faults = run, faults or []
        self.asked: list[ProbedWeights] = []
        self.done: list[int] = []
        self.failed: list[tuple[int, str]] = []
        self.open = threading.Event()
        if is_open:
            self.open.set()
        self.prober = Prober(run, PROBES, self.measure, self.on_done, lambda *told: self.failed.append(told))

    def measure(self, weights: ProbedWeights) -> Mapping[str, Any]:
        self.asked.append(weights)
        assert self.open.wait(30)
        assert not weights.url or self.run.storage.exists(weights.url)
        if self.faults:
            raise self.faults.pop(0)
        return {"knn_10": 0.1, "knn_20": 0.2, "linear": 0.3, "plan": "a plan"}

    def on_done(self, step: int, fields: Mapping[str, Any]) -> None:
        assert fields["epoch"] == step
        self.done.append(step)

    def end(self) -> None:
        self.prober.close()
        self.open.set()
        self.prober.thread.join(30)


def files(run: RunDirectory) -> list[str]:
    return sorted(name for name in run.storage.list_names(run.path("probes")) if name.endswith(".safetensors"))


def consolidated(bench: Bench, steps: range, last: int | None) -> None:
    """Train, as far as a prober sees it."""
    weights = MilestoneConsolidator(bench.run, lambda _: None, lambda *told: bench.failed.append(told), bench.prober)
    for step in steps:
        commit(bench.run, step)
        weights.look(step)
    weights.finish(last)


def test_every_step_that_is_due_is_probed_once_with_its_own_weights(run: RunDirectory) -> None:
    bench = Bench(run)

    consolidated(bench, range(1, 7), 6)
    bench.end()

    assert sorted(bench.done) == [0, 2, 3, 4, 6]  # random weights, every second epoch, a milestone, the end
    assert bench.done[0] == 6  # begun late, it begins with the newest
    assert bench.failed == []
    places = dict(zip(bench.done, bench.asked, strict=True))
    assert places[0] == ProbedWeights("", PROBES.control.model, RECIPE.seed, *RECIPE.statistics)
    names = {2: "probes", 3: "consolidated", 4: "probes", 6: "consolidated"}
    assert {step: places[step].url for step in names} == {
        step: run.path(folder, f"step-0000000{step}.safetensors") for step, folder in names.items()
    }
    assert files(run) == []  # and milestones stay
    assert run.storage.exists(places[3].url)


def test_a_driver_that_comes_later_makes_up_for_one_that_died(run: RunDirectory) -> None:
    first = Bench(run, is_open=False)
    consolidated(first, range(1, 5), None)
    assert files(run) == ["step-00000002.safetensors", "step-00000004.safetensors"]
    first.prober.leave()
    for step in (1, 2):  # pruned meanwhile
        run.storage.delete(run.path("commits", f"step-0000000{step}.json"))
    run.write_events(1, [probe_event(4, 0.5)])

    second = Bench(run)
    consolidated(second, range(5, 7), 6)
    second.end()

    assert sorted(second.done) == [0, 2, 3, 6]
    assert files(run) == []


def test_an_event_on_other_samples_does_not_count(run: RunDirectory) -> None:
    run.write_events(1, [probe_event(0, 0.5, plan="older"), probe_event(2, 0.5, plan="older"), probe_event(3, 0.5)])

    bench = Bench(run)
    consolidated(bench, range(1, 4), None)
    bench.end()

    assert sorted(bench.done) == [0, 2]


def test_what_fails_is_reported_and_what_died_is_tried_once_more(run: RunDirectory) -> None:
    faults: list[Exception] = [
        ProbeDiedError("its process died"),
        ProbeDiedError("its process died"),
        EvaluationError("--data", "must exist", "there", "restore it"),
        ProbeDiedError("its process died"),
    ]
    bench = Bench(run, faults=faults)

    consolidated(bench, range(1, 7), 6)
    bench.end()

    assert [step for step, _ in bench.failed] == [6, 6, 4, 3]
    assert [reason.endswith("it is tried again") for _, reason in bench.failed] == [True, False, False, True]
    assert "EvaluationError: --data: must exist" in bench.failed[2][1]
    assert bench.done == [3, 2, 0]
    assert files(run) == []


def test_weights_that_cannot_be_copied_are_reported_and_training_continues(run: RunDirectory) -> None:
    bench = Bench(run)
    commit(run, 2)
    for file in Path(run.path("checkpoints")).rglob("rank-*.safetensors"):
        file.unlink()

    consolidated(bench, range(3, 4), None)
    bench.end()

    assert [step for step, _ in bench.failed] == [2]
    assert "is missing" in bench.failed[0][1]
    assert sorted(bench.done) == [0, 3]


def test_a_step_whose_checkpoint_was_deleted_before_it_was_copied_is_reported(run: RunDirectory) -> None:
    bench = Bench(run)
    for step in (1, 3, 5):  # 2 and 4 were due
        bench.prober.offer(step, is_kept=False)
    bench.end()

    reason = "its checkpoint was deleted before it was copied: raise keep_checkpoints"
    assert bench.failed == [(2, reason), (4, reason)]


def test_the_end_waits_no_longer_than_it_is_told_to(run: RunDirectory) -> None:
    bench = Bench(run, is_open=False)
    consolidated(bench, range(1, 5), None)
    bench.prober.close()
    wait_until("a probe", lambda: bool(bench.asked), 10)
    assert bench.prober.left == [0, 2, 3, 4]

    bench.prober.give_up("too late")
    bench.open.set()
    bench.prober.thread.join(10)

    assert bench.failed == [(step, "too late") for step in (0, 2, 3, 4)]
    assert bench.done == []
    assert files(run) == []


def test_too_many_copies_do_not_pile_up(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.probes.prober.MOST_WAITING", 1)
    bench = Bench(run, is_open=False)

    consolidated(bench, range(1, 5), None)

    assert bench.prober.left == [0, 3, 4]
    assert [step for step, _ in bench.failed] == [2]
    assert "left out" in bench.failed[0][1]
    assert files(run) == ["step-00000004.safetensors"]
    bench.end()


def test_a_last_step_in_the_middle_of_an_epoch_is_probed(run: RunDirectory) -> None:
    short = dataclasses.replace(PROBES, schedule=Schedule.of(RECIPE.amended({"max_steps": 5}), steps_per_epoch=4))

    assert [step for step in range(1, 6) if short.is_due(step, is_milestone=False)] == [5]
    assert short.is_due(4, is_milestone=True)
    off = dataclasses.replace(PROBES, recipe=RECIPE.amended({"probe_epochs": 0}))
    assert [step for step in range(1, 7) if off.is_due(step, is_milestone=False)] == [6]
