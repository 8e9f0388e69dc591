"""A forecast of what an order costs and how well it mixes, from the plan alone: no index and no image is read.

Mixing is given as a design effect: chi-square per degree of freedom of a batch's histogram over shards, averaged over
an epoch. It is 1.0 for independent draws, and says by how much the variance of the shares is inflated (Kish 1965).

The excess comes from blocks. The keyed permutations make them all alike, so that two samples of a batch are either of
one block, or of two blocks like any other two. With P the ordered pairs of one block in a batch of B,

    E[chi-square] = (B*C + P*G + (B*(B-1) - P)*H) / B - B,      DEFF = E[chi-square] / (C - 1)

over C shards of shares p, where G and H are the means of 1/p over the pairs of one block and over those of two blocks
that share a shard, counting 0 for pairs that do not. A lane gives b samples to a step, out of a window of K*S, and
(S-1)/(K*S-1) of a sample's companions in the window are of its own block. So with blocks much smaller than shards, much
smaller than the dataset,

    DEFF = 1 + (b-1)*(S-1) / (K*S-1)

The code below also covers the smaller windows at the end of an epoch, steps that straddle windows, blocks that straddle
shards and small datasets, where drawing without replacement mixes better than independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.order.sample_order import Order

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Forecast:
    """An epoch of one order over shards of given sizes."""

    design_effect: float
    """Of the histogram of a batch over shards."""
    reads: float
    """Ranged requests for images in an epoch over all ranks, reading whole blocks and caching nothing."""
    companions: float
    """P / B: how many other samples of its own block a sample meets in its batch, on average."""

    @classmethod
    def of(cls, order: Order, shard_samples: Int64s) -> Forecast:
        """Compute it; takes milliseconds for 200,000 shards.

        Args:
            order: What is read when.
            shard_samples: (shards,) samples of each shard, in the manifest's order.
        """
        windows, cuts = _Windows.of(order), _Cuts.of(order, shard_samples[shard_samples > 0])
        pairs = order.lanes * _same_block_pairs(order, windows)
        reads = order.lanes * _reads(order, windows, cuts.inside_blocks / order.blocks)
        return cls(_design_effect(order, cuts, pairs), reads, pairs / order.global_batch_size)

    def label_effect(self, order: Order, correlation: float) -> float:
        """Design effect of a batch's histogram over labels, given the `intra_block_correlation` of the labels."""
        population = order.samples - order.global_batch_size
        return population / max(1, order.samples - 1) + self.companions * correlation


def dealt_effect(order: Order, shard_samples: Int64s, epoch: int) -> float:
    """The design effect over shards that an epoch turns out to have, counted out of the order itself.

    Forecast.design_effect is its mean over seeds and epochs. In small datasets an epoch has few windows of few blocks,
    so that single epochs lie some ten percent around it.

    Args:
        order: What is read when.
        shard_samples: (shards,) samples of each shard, in the manifest's order.
        epoch: Which epoch; each sample of it is looked at.
    """
    held = shard_samples[shard_samples > 0]
    ends, steps = np.cumsum(held), order.steps_per_epoch
    if len(held) == 1:
        return 1.0
    counts = np.zeros(steps * len(held), np.int64)
    for lane in range(order.lanes):
        shards = np.searchsorted(ends, order.lane_range(epoch, lane, 0, steps * order.lane_batch_size), side="right")
        places = np.repeat(np.arange(steps), order.lane_batch_size) * len(held) + shards
        counts += np.bincount(places, minlength=len(counts))
    expected = order.global_batch_size * held / order.samples
    excess = (counts.reshape(steps, -1) - expected) ** 2 / expected
    return float(excess.sum()) / steps / (len(held) - 1)


def intra_block_correlation(blocks: Sequence[Int64s]) -> float:
    """How much likelier two samples of one block are of one label than two of different blocks: 0 not at all, 1 always.

    Args:
        blocks: Labels of the samples of some random blocks.
    """
    labels, counts = zip(*(np.unique(block, return_counts=True) for block in blocks), strict=True)
    alike = sum(float((count * (count - 1)).sum()) for count in counts)
    pairs = sum(float(block.size) * (block.size - 1) for block in blocks)
    _, places = np.unique(np.concatenate(labels), return_inverse=True)
    totals = np.bincount(places, np.concatenate(counts)).astype(np.float64)
    all_alike = float((totals * (totals - 1)).sum()) - alike
    all_pairs = float(totals.sum() * (totals.sum() - 1)) - pairs
    if not pairs or not all_pairs or all_alike == all_pairs:
        return 0.0
    within, between = alike / pairs, all_alike / all_pairs
    return (within - between) / (1 - between)


@dataclass(frozen=True)
class _Windows:
    """The windows of a lane in an epoch, alike in all lanes. Arrays have one entry for windows that steps cut alike."""

    count: Int64s
    """How many windows are like this one."""
    start: Int64s
    """First position in the lane's stream."""
    used: Int64s
    """Positions that are used."""
    blocks: Int64s

    @classmethod
    def of(cls, order: Order) -> _Windows:
        b, size = order.lane_batch_size, order.window_samples
        full, rest = divmod(order.steps_per_epoch * b, size)
        period = b // math.gcd(size, b)  # after so many windows, one begins with a step again
        kinds = np.arange(min(full, period))
        return cls(
            count=np.append((full - kinds + period - 1) // period, int(rest > 0)),
            start=np.append(kinds, full) * size,
            used=np.append(np.full_like(kinds, size), rest),
            blocks=np.append(np.full_like(kinds, order.window_blocks), order.epoch_blocks - full * order.window_blocks),
        )


def _same_block_pairs(order: Order, windows: _Windows) -> float:
    """Ordered pairs of one block that a lane gives to a step, averaged over an epoch."""
    size, b = order.used_block_samples, order.lane_batch_size
    stop = windows.start + windows.used
    first, last = -(-windows.start // b), stop // b  # steps that begin in the window, and that end in it
    whole = np.maximum(last - first, 0)
    astride = first > last  # the window lies inside one step
    head = np.where(astride, windows.used, first * b - windows.start)
    tail = np.where(astride, 0, stop - last * b)
    pairs = head * (head - 1.0) + tail * (tail - 1.0) + whole * (b * (b - 1.0))
    alike = (size - 1) / np.maximum(1, windows.blocks * size - 1)
    return float((windows.count * pairs * alike).sum()) / order.steps_per_epoch


def _reads(order: Order, windows: _Windows, cuts_per_block: float) -> float:
    """Ranged requests of one lane in an epoch: one for each run of neighbours in a shard that the epoch uses."""
    size = order.used_block_samples
    held = np.maximum(1, windows.blocks * size)
    used = windows.used / held
    next_used = used * (windows.used - 1) / np.maximum(1, held - 1)  # a sample and the one after it
    runs = size * used - (size - 1) * next_used
    longer = order.samples / order.blocks - size  # share of blocks with a sample more, which omit another one
    apart = longer * (size - 1) / (size + 1) + cuts_per_block
    return float((windows.count * windows.blocks * (runs + apart * next_used)).sum())


@dataclass(frozen=True)
class _Cuts:
    """Cuts of blocks by shards; arrays have one entry a shard that is not empty."""

    shares: Floats
    """Of all samples."""
    pairs: Floats
    """Over blocks, the probability that two samples of a block are both of the shard, added up."""
    squares: Floats
    """The same for two draws with replacement."""
    inside_blocks: int
    """Borders between shards that lie inside a block."""

    @classmethod
    def of(cls, order: Order, shard_samples: Int64s) -> _Cuts:
        stop = np.cumsum(shard_samples)
        start = stop - shard_samples
        first, last = order.block_of(start), order.block_of(stop - 1)
        alone = first == last
        begin, end = order.block_start(first), order.block_start(last + 1)
        left = np.where(alone, shard_samples, order.block_start(first + 1) - start)
        right = np.where(alone, 0, stop - order.block_start(last))
        left_block, right_block = order.block_start(first + 1) - begin, end - order.block_start(last)
        between = np.maximum(last - first - 1, 0)
        pairs = between + _pair_share(left, left_block) + _pair_share(right, right_block)
        squares = between + (left / left_block) ** 2 + (right / right_block) ** 2
        return cls(shard_samples / order.samples, pairs, squares, int((begin < start).sum()))


def _pair_share(held: Int64s, size: Int64s) -> Floats:
    share: Floats = held * (held - 1.0) / np.maximum(1, size * (size - 1))
    return share


def _design_effect(order: Order, cuts: _Cuts, pairs: float) -> float:
    """Design effect of the histogram over shards; 1.0 for a single shard, which has no histogram."""
    B, M, C = order.global_batch_size, order.blocks, len(cuts.shares)
    if C == 1:
        return 1.0
    one_block = float((cuts.pairs / cuts.shares).sum()) / M
    two_blocks = float(((cuts.shares**2 * M**2 - cuts.squares) / cuts.shares).sum()) / max(1, M * (M - 1))
    chi_square = (B * C + pairs * one_block + (B * (B - 1) - pairs) * two_blocks) / B - B
    return chi_square / (C - 1)
