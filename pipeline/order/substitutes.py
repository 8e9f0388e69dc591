"""Substitutes for a sample that cannot be used: a pure function of (order, seed, epoch, sample id).

First the others of its block, in a keyed order, since a block is read in one piece anyway and its neighbours are as
likely to be used near this step. Where the whole block is unusable, as when a tar is missing, one sample each of other
blocks, all over the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.order import hashing
from pipeline.order.sample_order import Order

_BLOCK, _ELSEWHERE = 0x53554231, 0x53554232


def block_mates(order: Order, seed: int, epoch: int, sample: int) -> Iterator[int]:
    """The other samples of the block of `sample`, each once."""
    block = order.block_range(int(order.block_of(np.array([sample]))[0]))
    places = hashing.permuted(hashing.key(_BLOCK, seed, epoch, sample), len(block), np.arange(len(block)))
    yield from (mate for mate in (places + block.start).tolist() if mate != sample)


def from_elsewhere(order: Order, seed: int, epoch: int, sample: int) -> Iterator[int]:
    """One sample each of other blocks; every block comes up once."""
    own = int(order.block_of(np.array([sample]))[0])
    stream = hashing.key(_ELSEWHERE, seed, epoch, sample)
    for place in range(order.blocks):
        block = int(hashing.permuted(stream, order.blocks, np.array([place]))[0])
        members = order.block_range(block)
        if block != own:
            yield members.start + hashing.key(stream, block) % len(members)
