"""The demonstration's choices; `make pretrain` shows that it runs end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import demo
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.schedule import Schedule, order_of
from pipeline.errors import SourceError
from pipeline.ingest.photographs import cut_tiles
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable


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
