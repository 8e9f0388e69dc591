"""The demonstration's choices; `make pretrain` shows that it runs end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from probe_events import probe_events

from jobs.cli import demo
from jobs.control.run_plan import RunPlan
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.schedule import Schedule, order_of
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import ProbeCurve
from pipeline.errors import SourceError
from pipeline.ingest.photographs import cut_tiles
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage


@pytest.mark.parametrize("samples", [8, 20, 63, 64, 400, 1024, 5000, 100_000, 1_281_167])
def test_the_run_takes_about_as_many_steps_on_any_data_set(samples: int) -> None:
    manifest = Manifest(2, "", (), 0, ShardTable.of([ShardEntry("shard-000000", samples, 1, "ab" * 32)]))

    recipe = named_recipe("tiny").amended(demo.length_fields(manifest))

    schedule = Schedule.of(recipe, order_of(recipe, samples).steps_per_epoch)
    assert demo.STEPS <= schedule.total_steps <= 2 * demo.STEPS
    if recipe.epochs > 1:
        assert 0 < recipe.milestone_epochs[0] <= recipe.milestone_epochs[-1] < recipe.epochs


def test_other_photographs_make_another_run_and_the_same_ones_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "My Photos!"
    cut_tiles(folder, 10, seed=0)

    name, source = demo.run_and_source(str(folder), tmp_path)
    assert name.startswith("demo-my-photos-")
    assert source == folder
    assert demo.run_and_source(str(folder), tmp_path) == (name, source)

    cut_tiles(folder, 11, seed=0)
    assert demo.run_and_source(str(folder), tmp_path)[0] != name


def test_a_folder_without_photographs_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.local_stack, "up", None)

    with pytest.raises(SourceError, match="must be a folder with images"):
        demo.run_demo({"CONVMAE_HOME": str(tmp_path / "home")}, str(tmp_path / "nothing"))

    assert not (tmp_path / "home").exists()


def test_the_command_is_shown_as_one_types_it(tmp_path: Path) -> None:
    command = tmp_path / ".venv" / "bin" / "convmae"

    assert demo.own_command(command, tmp_path) == ".venv/bin/convmae"
    assert demo.own_command(command, tmp_path / "elsewhere") == "convmae"


def test_the_last_line_is_the_accuracy_beside_that_of_random_weights(tmp_path: Path) -> None:
    tiny, run = named_recipe("tiny"), RunDirectory.of(Storage(), str(tmp_path), "demo")
    plan = RunPlan(tiny, run, Schedule.of(tiny, 1))

    line = demo.accuracy_line(ProbeCurve.of(probe_events({0: 0.292, 200: 0.9, 400: 0.362})), plan)

    assert line == "kNN accuracy 36.2 % (random weights 29.2 %)"
    assert "`convmae evaluate demo --data URL`" in demo.accuracy_line(ProbeCurve(), plan)  # of an earlier release
    noted = dataclasses.replace(plan, probe_note="the images have no labels")
    assert demo.accuracy_line(ProbeCurve(), noted) == "kNN accuracy unknown: the images have no labels"
