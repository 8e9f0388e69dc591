"""A run whose images grow, of real ranks that are killed and started again around the change: the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from monitored_ranks import MonitoredRanks, long_recipe, made_dataset

from jobs.checkpoint import checkpoint
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.run.trace import differences, read_trace
from model import ConvMAE
from pipeline.store.storage import Storage

EPOCH_STEPS, EPOCHS = 8, 4
CHANGE = 2 * EPOCH_STEPS
"""Steps with small images."""
LAST = EPOCHS * EPOCH_STEPS


class Runs:
    """Runs by one recipe, each with a trace."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._attempts = folder, 0
        self.recipe = long_recipe(
            made_dataset(folder),
            str(folder / "runs"),
            **{
                "epochs": EPOCHS,
                "warmup_epochs": 1,
                "resolution_schedule": [[0, 32], [0.5, 64]],
                "digest_every_steps": 1,
                "checkpoint_every_steps": CHANGE - 1,
                "milestone_epochs": [],
            },
        )

    def attempt(self, name: str, world_size: int, **placement: object) -> MonitoredRanks:
        self._attempts += 1
        folder = self.folder / f"attempt-{self._attempts}"  # ranks meet in a file, which serves once
        folder.mkdir()
        return MonitoredRanks(self.recipe.amended(placement), name, folder, world_size, trace_url=self.trace_url(name))

    def train(self, name: str, world_size: int, **placement: object) -> None:
        """To the end, or to `max_steps`."""
        with self.attempt(name, world_size, **placement) as ranks:
            ranks.end(seconds=240.0)

    def trace_url(self, name: str) -> str:
        return str(self.folder / "traces" / name)

    def directory(self, name: str) -> RunDirectory:
        return RunDirectory.of(Storage(), self.recipe.run_root, name)

    def trajectory(self, name: str) -> list[tuple[int, float, str]]:
        """Step, loss and digest of weights and moments, as the newest attempt of each step has them."""
        rows = self.directory(name).read_latest_steps(("step", "loss", "digest")).rows()
        return [(row["step"], row["loss"], row["digest"]) for row in rows]

    def check_same(self, name: str, other: str) -> None:
        assert [step for step, _, _ in self.trajectory(other)] == list(range(1, LAST + 1))
        assert self.trajectory(name) == self.trajectory(other), "bit by bit"
        traces = (read_trace(Storage(), self.trace_url(each)) for each in (name, other))
        assert list(differences(*traces)) == [], "samples, crops and masks"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("growing"))
    found.train("calm", 1)
    return found


def test_ranks_that_are_killed_after_the_change_do_the_steps_across_it_again(runs: Runs) -> None:
    """The newest checkpoint is of the last step but one with small images; then the number of ranks changes."""
    with runs.attempt("killed", 2) as ranks:
        ranks.until(lambda: ranks.monitor.status()["step"] > CHANGE)
    (start,) = [event for event in runs.directory("killed").read_events() if event["kind"] == "start"]

    runs.train("killed", 3)

    event = runs.directory("killed").read_events()
    (again,) = [each for each in event if each["kind"] in ("restart", "resize")]
    assert again["step"] in (CHANGE - 1, 2 * (CHANGE - 1)), "from a checkpoint, almost always that before the change"
    first, second = (flops for _, flops in start["step_flops_from"])
    assert [step for step, _ in start["step_flops_from"]] == [1, CHANGE + 1]
    assert first < second == start["step_flops"]
    runs.check_same("killed", "calm")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [CHANGE - 1, CHANGE, CHANGE + 1])
def test_a_run_that_ends_beside_the_change_continues_with_the_same_bits(runs: Runs, steps: int) -> None:
    name = f"ended-{steps}"
    runs.train(name, 2, max_steps=steps)
    assert checkpoint.committed_steps(runs.directory(name))[-1] == steps

    runs.train(name, 1)

    runs.check_same(name, "calm")


def test_checkpoints_of_small_images_have_the_weights_of_the_whole_model(runs: Runs) -> None:
    recipe: Recipe = runs.directory("calm").read_recipe()
    whole = {name: tuple(value.shape) for name, value in ConvMAE(recipe.model).named_parameters()}

    commit = checkpoint.read_commit(runs.directory("calm"), CHANGE - 1)

    assert {tensor.name: tensor.shape for tensor in commit.tensors} == whole
