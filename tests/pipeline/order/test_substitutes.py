from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.order.sample_order import Order
from pipeline.order.substitutes import block_mates, from_elsewhere

ORDER = Order(611, global_batch_size=12, lanes=6, seed=5, block_samples=8, window_blocks=3)


@pytest.mark.parametrize("sample", [0, 7, 8, 300, 610])
def test_every_other_sample_of_the_block_comes_up_once(sample: int) -> None:
    block = int(ORDER.block_of(np.array([sample]))[0])

    mates = list(block_mates(ORDER, 1, 0, sample))

    assert sorted([*mates, sample]) == list(ORDER.block_range(block))


def test_epochs_seeds_and_samples_take_other_substitutes_and_the_same_ones_again() -> None:
    def first(seed: int, epoch: int, sample: int) -> int:
        return next(block_mates(ORDER, seed, epoch, sample))

    others = set(block_mates(ORDER, 1, 0, 300))

    assert {first(1, epoch, 300) for epoch in range(100)} == others
    assert {first(seed, 0, 300) for seed in range(100)} == others
    assert [first(1, epoch, 300) for epoch in range(20)] == [first(1, epoch, 300) for epoch in range(20)]


def test_elsewhere_is_one_sample_of_every_other_block() -> None:
    own = int(ORDER.block_of(np.array([300]))[0])

    samples = np.array(list(from_elsewhere(ORDER, 1, 0, 300)))

    assert sorted(ORDER.block_of(samples).tolist()) == [block for block in range(ORDER.blocks) if block != own]


def test_blocks_of_two_thousand_million_samples_are_not_listed() -> None:
    large = Order(2 * 10**9, 4096, 64, 0)

    assert len(set(itertools.islice(from_elsewhere(large, 1, 0, 10**9), 100))) == 100
