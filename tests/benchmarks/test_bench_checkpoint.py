from __future__ import annotations

from pathlib import Path

import pytest
from bench_checkpoint import measure, report
from local_s3 import local_s3

from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory


def rows(*stalls: float) -> list[dict[str, float]]:
    return [{"stall": stall, "until_commit": 2 * stall, "steps": 2, "slowed": 6.0} for stall in stalls]


@pytest.mark.parametrize(("stall", "verdict"), [(4.0, "reached"), (40.0, "not reached")])
def test_the_share_is_of_the_default_interval(stall: float, verdict: str) -> None:
    recipe = named_recipe("convmae_base")
    found = {"plain": [1.0, 2.0, 1.5], "bytes": 5e6, "ours": rows(stall, stall, 9 * stall), "stock": rows(80.0)}

    lines = report(recipe, found)

    share = stall / (1.5 * recipe.checkpoint_every_steps)
    assert f"{share:.3%} of the default interval of {recipe.checkpoint_every_steps} steps" in lines[-1]
    assert f"(goal 2%: {verdict})" in lines[-1]
    assert f"{80 / stall:.1f} times the stall; steps during an upload take 2.00 times as long" in lines[-2]


@pytest.mark.slow
def test_both_sides_save_in_turn(tmp_path: Path) -> None:
    changes = {"global_batch_size": 4, "micro_batch_size": 2, "lanes": 2, "min_workers": 1, "max_workers": 2}
    recipe: Recipe = named_recipe("tiny").amended(changes)
    (tmp_path / "s3").mkdir()
    with local_s3(tmp_path / "s3") as server:
        run = RunDirectory.of(server.storage, f"{server.url}/runs", "bench")

        found = measure(recipe, server.storage, run.url, 1, tmp_path)

    assert found["ours"][0]["steps"] >= 1
    assert found["ours"][0]["stall"] < found["ours"][0]["until_commit"]
    assert found["stock"][0]["stall"] >= found["stock"][0]["written"]
    assert found["bytes"] > 1e6
