"""A rank's part of the state, copied off the device."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load
from steps import Rank, recipe_for
from torch import Tensor

from jobs.checkpoint.deepspeed_internals import MOMENTS, adam_slots, owned_slices
from jobs.checkpoint.rank_file import RankFile

pytestmark = pytest.mark.usefixtures("group")


def owned(rank: Rank) -> dict[str, Tensor]:
    """What the rank's optimizer has, by the keys of its file."""
    found = {}
    for flat, pieces in owned_slices(rank.engine):
        slots = adam_slots(rank.engine, flat)
        for kind, values in (("weight", flat.data), *((moment, slots[moment]) for moment in MOMENTS)):
            for piece in pieces:
                found[f"{kind}/{piece.name}"] = values[piece.offset : piece.offset + piece.length].cpu().clone()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_save_has_the_bits_of_its_step(device: torch.device, stage: int) -> None:
    rank = Rank(recipe_for(device, zero_stage=stage, reproducible="rounding"), device)
    file = RankFile(rank.engine, 0)

    for step in (1, 2):
        rank.train(1)
        expected = owned(rank)
        part = file.copied()
        rank.train(1)  # does not reach the copy

        found = load(bytes(part.content))
        assert part.path.read_bytes() == bytes(part.content)
        assert part.optimizer_step == 2 * step - 1
        assert {key for key in found if not key.startswith("fixed/")} == expected.keys()
        for key, values in expected.items():
            assert torch.equal(found[key], values), key
        fixed = {name: value for name, value in rank.engine.module.state_dict().items() if f"fixed/{name}" in found}
        assert fixed
        if stage < 3:
            for name, value in fixed.items():
                assert torch.equal(found[f"fixed/{name}"], value.cpu().reshape(-1)), name


def test_before_the_first_step_the_moments_are_zero(device: torch.device) -> None:
    rank = Rank(recipe_for(device), device)

    part = RankFile(rank.engine, 0).copied()

    found = load(bytes(part.content))
    assert part.optimizer_step == 0
    assert not any(found[key].any() for key in found if key.startswith(MOMENTS))
    assert any(found[key].any() for key in found if key.startswith("weight/"))


def test_a_copy_that_is_needed_is_not_written_over(device: torch.device) -> None:
    rank = Rank(recipe_for(device), device)
    file = RankFile(rank.engine, 0)
    first = file.copied()
    first.claim()
    before = bytes(first.content)
    rank.train(1)

    second = file.copied()

    assert bytes(first.content) == before != bytes(second.content)
    assert second.room is not first.room
    first.release()
    assert file.copied().room is first.room
    assert len(second.content) == file.bytes
