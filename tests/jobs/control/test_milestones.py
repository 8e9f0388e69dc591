from __future__ import annotations

from pathlib import Path

import pytest
from testbed import is_consolidated
from zero_material import commit_state, random_material

from jobs.checkpoint import checkpoint
from jobs.consolidation.target import ConsolidatedWeights
from jobs.control.milestones import MilestoneConsolidator
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

MATERIAL = random_material(500)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with three checkpoints, of which the second is a milestone."""
    run = RunDirectory.of(Storage(retry_seconds=1), str(tmp_path), "first")
    for step in (1, 2, 3):
        commit(run, step, milestone=step == 2)
    return run


def commit(run: RunDirectory, step: int, *, milestone: bool) -> None:
    commit_state(run, named_recipe("tiny"), MATERIAL, step=step, stage=1, world_size=2, milestone=milestone)


class Told:
    """What a run's monitor was told."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.failed: dict[int, str] = {}

    def on_done(self, result: ConsolidatedWeights) -> None:
        self.done.append(result.step)

    def on_failure(self, step: int, error: str) -> None:
        self.failed[step] = error


def test_milestones_and_the_last_checkpoint_are_consolidated_once(run: RunDirectory) -> None:
    told = Told()
    consolidator = MilestoneConsolidator(run, told.on_done, told.on_failure)
    for step in (3, 3):
        consolidator.look(step)
    commit(run, 4, milestone=True)
    consolidator.look(4)

    commit(run, 5, milestone=False)
    consolidator.finish(5)

    assert told.done == [2, 4, 5]
    assert told.failed == {}
    assert [step for step in range(1, 6) if is_consolidated(run, step)] == [2, 4, 5]


def test_a_driver_that_comes_later_makes_up_for_one_that_died(run: RunDirectory) -> None:
    first, second = Told(), Told()
    MilestoneConsolidator(run, first.on_done, first.on_failure).finish(None)
    commit(run, 4, milestone=True)

    MilestoneConsolidator(run, second.on_done, second.on_failure).finish(None)

    assert (first.done, second.done) == ([2], [4])


def test_a_failure_is_told_and_the_next_milestone_is_made(run: RunDirectory) -> None:
    (file, *_) = Path(run.path("checkpoints", checkpoint.folder_name(2))).glob("rank-*.safetensors")
    file.unlink()
    told = Told()
    consolidator = MilestoneConsolidator(run, told.on_done, told.on_failure)
    commit(run, 4, milestone=True)

    consolidator.finish(3)

    assert sorted(told.done) == [3, 4]
    assert told.failed.keys() == {2}
    assert "DamagedCheckpointError" in told.failed[2]
    assert "is missing" in told.failed[2]
    assert not is_consolidated(run, 2)


def test_a_run_that_did_not_finish_has_no_last_weights(run: RunDirectory) -> None:
    told = Told()

    MilestoneConsolidator(run, told.on_done, told.on_failure).finish(None)

    assert told.done == [2]
