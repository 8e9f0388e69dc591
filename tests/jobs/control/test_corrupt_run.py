"""A run of real ranks, one of which flips a bit of each gradient: it is named, before anything is updated."""

from __future__ import annotations

from pathlib import Path

import pytest
from monitored_ranks import MonitoredRanks, long_recipe, made_dataset

EVERY = 4


@pytest.mark.parametrize("world_size", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_flips_a_bit_ends_the_attempt_at_the_next_verified_step(tmp_path: Path, world_size: int) -> None:
    recipe = long_recipe(made_dataset(tmp_path), str(tmp_path / "runs"), verify_steps_every=EVERY)
    with MonitoredRanks(recipe, "flips", tmp_path, world_size, rank_1="flips") as ranks:
        for rank, process in enumerate(ranks.processes):
            assert process.wait(120) != 0
            assert "CorruptGradientError" in ranks.log(rank), "all ranks know why"

        (event,) = ranks.events("corruption")
        assert event["step"] == EVERY
        assert [row["step"] for row in ranks.run.read_history()] == list(range(1, EVERY)), "no update was made"
        if world_size == 2:
            assert (event["ranks"], event["certain"]) == ([0, 1], False), "each insists"
            assert ranks.monitor.nodes_left_out() == set()
        else:
            assert (event["ranks"], event["hosts"], event["certain"]) == ([1], ["host-1"], True)
            assert "rank 1 computed another gradient than the others for a grain of rank 0" in event["reason"]
            assert ranks.monitor.nodes_left_out() == {"node-1"}
