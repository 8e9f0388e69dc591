"""Exchanges between ranks, with ranks in threads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_threads import Ranks
from safetensors.torch import save_file

from jobs.checkpoint import rank_group
from jobs.checkpoint.rank_group import WORD_BYTES, RankGroup
from jobs.control.worker_group import health_check_seconds
from jobs.errors import DamagedCheckpointError, WeightsFileError
from jobs.recipe.named_recipes import named_recipe
from jobs.weights import initial
from jobs.weights.initial import load_initial_weights
from pipeline.store.storage import Storage

WORLD_SIZE = 3


@pytest.fixture
def on_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RankGroup], Any]], list[Any]]:
    """What each rank gets, by rank."""
    ranks = Ranks(WORLD_SIZE)
    monkeypatch.setattr(rank_group, "dist", ranks)
    return lambda work: ranks.run(lambda rank: work(RankGroup(rank, WORLD_SIZE)))


def test_values_of_one_rank_and_of_all_reach_all(on_all: Any) -> None:
    assert on_all(lambda group: group.broadcast(f"of {group.rank}", source=1)) == ["of 1"] * WORLD_SIZE
    assert on_all(lambda group: group.gathered(group.rank * 10)) == [[0, 10, 20]] * WORLD_SIZE
    assert on_all(lambda group: group.total(group.rank + 1)) == [6] * WORLD_SIZE


def test_an_error_on_some_ranks_is_raised_on_all_and_is_that_of_the_lowest(on_all: Any) -> None:
    def work(rank: int) -> str:
        if rank:
            raise DamagedCheckpointError("checkpoint", "must be whole", rank, "take another")
        return "fine"

    def caught(group: RankGroup) -> str:
        with pytest.raises(DamagedCheckpointError) as error:
            group.together(lambda: work(group.rank))
        return str(error.value)

    assert (
        on_all(caught) == [str(DamagedCheckpointError("checkpoint", "must be whole", 1, "take another"))] * WORLD_SIZE
    )
    assert on_all(lambda group: group.together(lambda: group.rank)) == [0, 1, 2]


def test_parts_that_do_not_end_at_words_add_up_to_the_whole(on_all: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "BUCKET_BYTES", 2 * WORD_BYTES)
    whole = torch.randint(0, 256, (10 * WORD_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    edges = [0, 13, 51, len(whole)]

    def work(group: RankGroup) -> torch.Tensor:
        room, mine = torch.zeros_like(whole), slice(edges[group.rank], edges[group.rank + 1])
        room[mine] = whole[mine]
        group.add_up(room)
        return room

    assert all(torch.equal(room, whole) for room in on_all(work))


def test_bits_that_are_set_on_some_rank(on_all: Any) -> None:
    found = on_all(lambda group: group.union(np.arange(7) % WORLD_SIZE == group.rank + (group.rank == 2)))

    assert all(bits.tolist() == [True, True, False, True, True, False, True] for bits in found)


def test_weights_that_a_run_starts_from_are_read_by_one_rank(
    on_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, local_copy = [], initial.local_copy
    monkeypatch.setattr(initial, "local_copy", lambda storage, url: (read.append(url), local_copy(storage, url))[1])
    path = tmp_path / "weights.safetensors"
    weights = {
        "a": torch.randn(5, 3),
        "scalar": torch.tensor(2.5),
        "steps": torch.tensor([7]),
        "half": torch.ones(3).half(),
    }
    save_file(weights, path)
    recipe = named_recipe("tiny").amended({"init_from": str(path)})
    pinned = recipe.amended({"init_sha256": hashlib.sha256(path.read_bytes()).hexdigest()})

    found = on_all(lambda group: load_initial_weights(Storage(), pinned, group))

    for state in found:
        assert state.keys() == weights.keys()
        for name, value in weights.items():
            assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape)
            assert torch.equal(state[name], value)
    assert read == [str(path)]
    with pytest.raises(WeightsFileError, match="must be the file with SHA-256"):
        on_all(lambda group: load_initial_weights(Storage(), recipe.amended({"init_sha256": "0" * 64}), group))


@pytest.mark.parametrize(("workers", "seconds"), [(1, 0.5), (512, 0.5), (1024, 1.0), (4096, 4.0)])
def test_many_workers_are_polled_less_often(workers: int, seconds: float) -> None:
    assert health_check_seconds(workers) == seconds
