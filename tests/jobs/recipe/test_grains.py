"""Grains as a recipe has them: how large, who may have them, and runs that were begun without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.control.run_plan import begun_way
from jobs.errors import RecipeError, RunError
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import order_of
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

TINY, BASE = named_recipe("tiny"), named_recipe("convmae_base")


@pytest.mark.parametrize(
    ("changes", "grain", "lanes_together"),
    [
        ({}, 64, 4),  # 64 GPUs have one each
        ({"micro_batch_size": 100}, 64, 4),
        ({"micro_batch_size": 60}, 32, 2),  # 48 is three lanes' shares, and three divide no 256 lanes
        ({"micro_batch_size": 8}, 8, 1),
        ({"micro_batch_size": 5}, 4, 1),
        ({"lanes": 32, "max_workers": 32, "micro_batch_size": 128}, 128, 1),
        ({"grain_size": 16}, 16, 1),
        ({"zero_stage": 3}, 64, 1),
        ({"reproducible": "rounding"}, 64, 1),
    ],
)
def test_the_default_grain(changes: dict[str, object], grain: int, lanes_together: int) -> None:
    recipe = BASE.amended(changes)

    assert (recipe.grain, recipe.lanes_together) == (grain, lanes_together)


@pytest.mark.parametrize("recipe", [TINY, BASE, BASE.amended({"grain_size": 128, "max_workers": 32})])
def test_each_rank_has_whole_grains_of_the_same_batch(recipe: Recipe) -> None:
    order = order_of(recipe, 20_000)
    grains = recipe.global_batch_size // recipe.grain

    for world_size in (1, 2, 3, 5, min(grains, recipe.lanes // recipe.lanes_together)):
        sizes = [order.rank_batch_size(rank, world_size) for rank in range(world_size)]
        assert sum(sizes) == recipe.global_batch_size
        assert all(size and size % recipe.grain == 0 for size in sizes)


def test_a_grain_that_cuts_lanes_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as refused:
        BASE.amended({"grain_size": 24})

    assert str(refused.value) == (
        "grain_size: must divide global_batch_size / lanes = 16, or be 16 times a divisor of lanes, got 24; "
        "the nearest that does is grain_size=16"
    )


def test_more_workers_than_grains_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"max_workers: must be at most 64, the groups of 4 lanes .* grain_size=16"):
        BASE.amended({"max_workers": 65})


def test_a_smaller_micro_batch_is_another_trajectory_only_where_it_is_another_grain() -> None:
    assert TINY.amended({"micro_batch_size": 16}).digest() == TINY.digest()
    assert TINY.amended({"micro_batch_size": 4}).digest() != TINY.digest()
    assert TINY.amended({"micro_batch_size": 4, "grain_size": 8}).digest() == TINY.digest()


OLDER = {
    "tiny": named_recipe("tiny").amended({"model.norm_pix": False, "base_learning_rate": 4e-3}),
    "convmae_base": named_recipe("convmae_base"),
}
OLDER_DIGESTS = {
    "tiny": "7ef3c6ed1a91e97fcce0b84973857e0513c59a079f4b0f8ead225a1f5dddcd4a",
    "convmae_base": "5945ecf949ac00b8517a0c66bd43eaccd907603242973041708ce730d09985ac",
}
"""Of the recipes before there were grains; the second in bf16."""


@pytest.mark.parametrize("name", OLDER_DIGESTS)
def test_a_run_that_was_begun_before_there_were_grains_keeps_its_way(name: str, tmp_path: Path) -> None:
    run = RunDirectory(Storage(), str(tmp_path / "older"))
    fields = {key: value for key, value in OLDER[name].to_json().items() if "grain" not in key}
    del fields["reproducible"], fields["digest_every_steps"]
    run.storage.write(run.path("recipe.json"), json.dumps(fields).encode())

    recipe = run.read_recipe()

    assert not recipe.is_exact
    assert recipe.precision == {"fp32": "fp32", "bf16": "bf16_pure"}[fields["precision"]]
    assert recipe.digest() == OLDER_DIGESTS[name]
    for _ in range(2):  # the second time it is as it was written the first time
        again = begun_way(run, OLDER[name])
        assert again == recipe
        run.claim(again)
    with pytest.raises(RunError, match="epochs: "):
        run.check_recipe(begun_way(run, OLDER[name].amended({"epochs": 99})))
