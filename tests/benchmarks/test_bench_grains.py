from __future__ import annotations

import bench_grains
import pytest


def test_the_cost_is_the_median_over_rounds_of_both_sides_cpu_time() -> None:
    rounds = {"bits": [(1.1, 9.0), (2.0, 9.0), (1.3, 1.0)], "rounding": [(1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]}

    assert bench_grains.cost(rounds) == pytest.approx(0.3)


@pytest.mark.slow
def test_both_sides_train_in_turn_on_every_rank() -> None:
    recipe = bench_grains.bench_recipe("tiny", 4, 2)

    rounds = bench_grains.measure(recipe, 2, rounds=1)

    assert recipe.grain == 2 and rounds.keys() == {"bits", "rounding"}
    assert all(cpu > 0 and passed > 0 for steps in rounds.values() for cpu, passed in steps)
