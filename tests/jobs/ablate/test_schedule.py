"""The order of work, against runs that are made up; and whether a cluster has room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from jobs.ablate.room import NOTHING, Occupant, Resources, Seen, has_room
from jobs.ablate.schedule import Schedule
from jobs.ablate.spec import Spec, Trial
from jobs.errors import RunError
from jobs.recipe.named_recipes import named_recipe

TRIALS = Spec.load("mae_small").trials  # six


@dataclass
class MadeUpRuns:
    """Runs that end when a test says so."""

    room: int = 2
    finished: set[Trial] = field(default_factory=set)
    at_work: set[Trial] = field(default_factory=set)
    ends: dict[Trial, str] = field(default_factory=dict)
    refused: set[Trial] = field(default_factory=set)
    begun: list[Trial] = field(default_factory=list)
    stopped: bool = False

    def is_finished(self, trial: Trial) -> bool:
        return trial in self.finished

    def job_of(self, trial: Trial) -> str:
        return "job" if trial in self.at_work else ""

    def begin(self, trial: Trial) -> str:
        if trial in self.refused:
            raise RunError("run", "must not be running already", trial.run_name, "wait")
        self.begun.append(trial)
        return "job"

    def end_of(self, trial: Trial, job: str) -> str:
        assert job == "job"
        return self.ends.get(trial, "")

    def has_room(self, trial: Trial, running: Sequence[Trial]) -> bool:
        assert trial not in running
        return len(running) < self.room

    def is_stopped(self) -> bool:
        return self.stopped


def schedule(runs: MadeUpRuns, **options: int) -> tuple[Schedule, list[Trial]]:
    evaluated: list[Trial] = []
    return Schedule(runs, evaluated.append, lambda _: None, **options), evaluated


def test_a_command_that_was_killed_redoes_nothing_and_follows_what_is_at_work() -> None:
    runs = MadeUpRuns(finished={TRIALS[0]}, at_work={TRIALS[1]})
    work, evaluated = schedule(runs)

    work.look(TRIALS)
    work.tick()

    assert evaluated == [TRIALS[0]]
    assert runs.begun == [TRIALS[2]]  # room for two, and one is at work
    runs.ends = dict.fromkeys(TRIALS, "finished")
    while not work.is_over:
        work.tick()
    assert runs.begun == list(TRIALS[2:])
    assert sorted(map(id, evaluated)) == sorted(map(id, TRIALS))


@pytest.mark.parametrize(("at_most", "begun"), [(0, 2), (1, 1), (4, 4)])
def test_as_many_at_once_as_there_is_room_for_or_as_are_asked_for(at_most: int, begun: int) -> None:
    work, _ = schedule(runs := MadeUpRuns(), at_most=at_most)

    work.look(TRIALS)
    work.tick()

    assert len(runs.begun) == begun


def test_a_run_that_fails_is_reported_and_the_others_continue() -> None:
    runs = MadeUpRuns(refused={TRIALS[1]}, ends=dict.fromkeys(TRIALS, "finished") | {TRIALS[0]: "failed: no disk"})
    work, evaluated = schedule(runs)

    work.look(TRIALS)
    while not work.is_over:
        work.tick()

    assert work.faults[TRIALS[0].run_name] == "failed: no disk"
    assert "must not be running already" in work.faults[TRIALS[1].run_name]
    assert evaluated == list(TRIALS[2:])


def test_a_run_is_submitted_even_where_it_gets_fewer_workers_than_it_asks_for() -> None:
    work, _ = schedule(runs := MadeUpRuns(room=0))

    work.look(TRIALS)
    work.tick()
    work.tick()

    assert runs.begun == [TRIALS[0]]


def test_nothing_is_submitted_after_a_stop() -> None:
    work, _ = schedule(runs := MadeUpRuns(stopped=True))

    work.look(TRIALS)
    work.tick()

    assert (runs.begun, work.is_over) == ([], True)


def cluster(offered: float, available: float) -> Seen:
    return Seen(Resources(offered, 0.0), Resources(available, 0.0))


@pytest.mark.parametrize(
    ("seen", "workers", "fits"),
    [
        (cluster(4, 4), [], True),
        (cluster(4, 2), [2], True),
        (cluster(4, 4), [0], True),  # it was submitted, and has reserved nothing yet
        (cluster(3, 1), [2], False),
        (cluster(4, 1), [2], False),  # somebody else has one
        (cluster(4, 4), [0, 0], False),
        (cluster(1, 1), [], False),
    ],
)
def test_room_is_what_neither_others_have_nor_ours_may_grow_to(seen: Seen, workers: list[float], fits: bool) -> None:
    recipe = named_recipe("tiny").amended({"max_workers": 2, "cpus_per_worker": 1.0})

    assert has_room(recipe, seen, [Occupant(recipe, count) for count in workers]) is fits


def test_a_gpu_run_needs_gpus_and_cores() -> None:
    recipe = named_recipe("convmae_base")  # 64 workers, 8 cores each

    assert Resources.of(recipe) == Resources(512.0, 64.0)
    assert not has_room(recipe, Seen(Resources(512.0, 63.0), Resources(512.0, 63.0)), [])
    assert NOTHING.holds(NOTHING)
