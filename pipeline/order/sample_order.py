"""The order of samples: which of them make up global batch t, by lanes of blocks, in pure NumPy.

The order depends on (samples, global_batch_size, lanes, seed, block_samples, window_blocks) and the step alone. Ranks
own whole lanes, so a batch has the same samples whatever the world size, and any step is reached without replay.

    sample   0 ... N-1 in the manifest's order
    block    S consecutive samples: one ranged read
    lane     one of L virtual readers; owns the same blocks for the whole run; gives B / L samples to each batch
    window   K blocks of a lane that are open at once, their samples shuffled together

Trade-off: a larger window shuffles better and holds more bytes open; L * K * S samples over all ranks.

Hand-written, since the orders of torch's samplers, webdataset, Streaming and LitData depend on the number of ranks,
hold an id of every sample in memory, or reach a step only by replay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import OrderError
from pipeline.order import hashing

ORDER_VERSION = 2
"""Changes whenever the same arguments would give other samples; part of a run's data state."""

LEAST_EPOCH_RATIO = 0.99

Int64s = npt.NDArray[np.int64]

_HOME, _EPOCH, _WINDOW, _SPARE = range(4)


@dataclass(frozen=True)
class Order:
    """The order of one run. Cheap to make, hashable, picklable; every method is a pure function."""

    samples: int
    """N, samples in the dataset."""
    global_batch_size: int
    """B, samples in a step over all ranks."""
    lanes: int
    """L, divides B; also the largest possible world size."""
    seed: int
    block_samples: int = 32
    """Wanted S. Smaller datasets get smaller blocks: the largest S that keeps 99% of the steps that S=1 would give."""
    window_blocks: int = 64
    """K."""
    lanes_together: int = 1
    """Neighbouring lanes that are always on one rank; divides L. Decides who reads what, not what is read."""

    def __post_init__(self) -> None:
        for name in ("samples", "global_batch_size", "lanes", "block_samples", "window_blocks", "lanes_together"):
            if getattr(self, name) < 1:
                raise OrderError(name, "must be at least 1", getattr(self, name), "raise it")
        if self.global_batch_size % self.lanes:
            divisors = [d for d in range(1, self.global_batch_size + 1) if self.global_batch_size % d == 0]
            nearest = min(divisors, key=lambda divisor: abs(divisor - self.lanes))
            rule = f"must divide global_batch_size {self.global_batch_size}"
            raise OrderError("lanes", rule, self.lanes, f"{nearest} is the nearest that does")
        if self.lanes % self.lanes_together:
            raise OrderError("lanes_together", f"must divide lanes {self.lanes}", self.lanes_together, "take 1")
        if self.samples < self.global_batch_size:
            rule = f"must be at least global_batch_size {self.global_batch_size}"
            raise OrderError("samples", rule, self.samples, "lower global_batch_size or add images to the dataset")
        if (self.samples + 1) * self.blocks >= 1 << 63:  # block_of multiplies them
            rule = f"must stay below 2**63 when multiplied by the number of blocks, {self.blocks}"
            remedy = "raise block_samples, or restore the manifest that has so many"
            raise OrderError("samples", rule, self.samples, remedy)

    @property
    def lane_batch_size(self) -> int:
        """b = B / L, samples that each lane gives to a step."""
        return self.global_batch_size // self.lanes

    @functools.cached_property
    def blocks(self) -> int:
        """M, blocks in the dataset."""
        ideal_steps = self.samples // self.global_batch_size
        least_steps = math.ceil(ideal_steps * LEAST_EPOCH_RATIO)
        wanted = min(self.block_samples, self.samples // self.lanes)
        return next(
            self.samples // size for size in range(wanted, 0, -1) if self._steps(self.samples // size) >= least_steps
        )

    @functools.cached_property
    def used_block_samples(self) -> int:
        """S, samples that each block gives to an epoch; a block holds this many or one more."""
        return self.samples // self.blocks

    @functools.cached_property
    def window_samples(self) -> int:
        """Samples of a whole window, K * S."""
        return self.window_blocks * self.used_block_samples

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Steps for which every lane still has samples; the rest of an epoch is dropped, another every epoch."""
        return self._steps(self.blocks)

    @functools.cached_property
    def epoch_blocks(self) -> int:
        """Blocks of each lane that an epoch opens; fewer than S samples of them are left over. The rest pause."""
        return -(-self.steps_per_epoch * self.lane_batch_size // self.used_block_samples)

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def rank_lanes(self, rank: int, world_size: int) -> range:
        """The lanes that `rank` owns, consecutive: {l : floor(l * world_size / L) = rank} where each may be alone."""
        most, together = self.lanes // self.lanes_together, self.lanes_together
        if not 1 <= world_size <= most:
            lanes = f"lanes {most}" if together == 1 else f"{most}, lanes {self.lanes} in groups of {together}"
            rule = f"must be between 1 and {lanes}"
            raise OrderError("world_size", rule, world_size, f"take a number from 1 to {most}, or raise lanes")
        return range(-(-rank * most // world_size) * together, -(-(rank + 1) * most // world_size) * together)

    def batch(self, step: int) -> Int64s:
        """(B,) ids of the samples of a step, lane after lane."""
        return self.rank_batch(step, 0, 1)

    def rank_batch(self, step: int, rank: int, world_size: int) -> Int64s:
        """(n_r,) ids of the samples that `rank` reads for a step; the ranks' batches in turn are batch(step)."""
        return np.concatenate([self.lane_batch(step, lane) for lane in self.rank_lanes(rank, world_size)])

    def rank_batch_size(self, rank: int, world_size: int) -> int:
        """n_r, samples that `rank` reads for each step."""
        return len(self.rank_lanes(rank, world_size)) * self.lane_batch_size

    def lane_batch(self, step: int, lane: int) -> Int64s:
        """(b,) ids of the samples that one lane gives to a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first, last = step_in_epoch * self.lane_batch_size, (step_in_epoch + 1) * self.lane_batch_size
        return self.lane_range(epoch, lane, first, last)

    def lane_range(self, epoch: int, lane: int, first: int, last: int) -> Int64s:
        """Ids at positions [first, last) of a lane's stream of samples in an epoch."""
        parts = []
        while first < last:
            window, offset = divmod(first, self.window_samples)
            taken = min(last - first, self.window_samples - offset)
            parts.append(self.window(epoch, lane, window)[offset : offset + taken])
            first += taken
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def window(self, epoch: int, lane: int, window: int) -> Int64s:
        """All ids of one window of a lane, in the order in which they are used."""
        return _window_samples(self, epoch, lane, window)

    def block_of(self, samples: Int64s) -> Int64s:
        """The block that each sample lies in."""
        return ((samples + 1) * self.blocks - 1) // self.samples

    def block_start(self, blocks: Int64s) -> Int64s:
        """The first sample of each block."""
        return blocks * self.samples // self.blocks

    def lane_blocks(self, lane: int) -> int:
        """How many blocks a lane owns."""
        return (self.blocks - lane + self.lanes - 1) // self.lanes

    def block_range(self, block: int) -> range:
        """The samples of a block."""
        start, stop = self.block_start(np.array([block, block + 1])).tolist()
        return range(start, stop)

    def paused_blocks(self, epoch: int, lane: int) -> Int64s:
        """The blocks of a lane that an epoch omits; different ones each epoch."""
        return _lane_blocks(self, epoch, lane, np.arange(self.epoch_blocks, self.lane_blocks(lane)))

    def _steps(self, blocks: int) -> int:
        return (blocks // self.lanes) * (self.samples // blocks) // self.lane_batch_size


@functools.lru_cache(maxsize=2048)
def _window_samples(order: Order, epoch: int, lane: int, window: int) -> Int64s:
    places = np.arange(window * order.window_blocks, min(order.epoch_blocks, (window + 1) * order.window_blocks))
    samples = _block_samples(order, epoch, _lane_blocks(order, epoch, lane, places)).reshape(-1)
    shuffle = hashing.key(order.seed, _WINDOW, epoch, lane, window)
    samples = samples[hashing.permuted(shuffle, samples.size, np.arange(samples.size))]
    samples.flags.writeable = False  # shared by all callers through the cache
    return samples


def _lane_blocks(order: Order, epoch: int, lane: int, places: Int64s) -> Int64s:
    """The blocks at `places` of a lane's order in an epoch."""
    in_lane = hashing.permuted(hashing.key(order.seed, _EPOCH, epoch, lane), order.lane_blocks(lane), places)
    return hashing.permuted(hashing.key(order.seed, _HOME), order.blocks, in_lane * order.lanes + lane)


def _block_samples(order: Order, epoch: int, blocks: Int64s) -> Int64s:
    """(len(blocks), S) ids; a block with one sample more omits a different one every epoch."""
    starts = order.block_start(blocks)
    sizes = order.block_start(blocks + 1) - starts
    stream = np.uint64(hashing.key(order.seed, _SPARE, epoch))
    turns = (hashing.mixed(blocks.astype(np.uint64) ^ stream) % sizes.astype(np.uint64)).astype(np.int64)
    offsets = np.arange(order.used_block_samples)
    return starts[:, None] + (offsets[None, :] + turns[:, None]) % sizes[:, None]


@dataclass(frozen=True)
class ConsumedDigest:
    """A digest of consumed ids in any order: equal for equal multisets; addable over lanes, ranks and steps."""

    count: int = 0
    total: int = 0
    """Sum of the ids' 64-bit hashes, modulo 2**64; a sum, so that ranks can fold it with an all-reduce."""

    @classmethod
    def of(cls, samples: Int64s) -> ConsumedDigest:
        """Digest of (n,) sample ids."""
        return cls(len(samples), int(hashing.mixed(samples.astype(np.uint64)).sum(dtype=np.uint64)))

    @classmethod
    def from_words(cls, words: Sequence[int]) -> ConsumedDigest:
        """Put together what was added up, with overflow, from the `words` of several."""
        return cls(words[0], words[1] % 2**64)

    def words(self) -> tuple[int, int]:
        """Count and total as signed 64-bit integers."""
        return self.count, self.total - 2**64 if self.total >= 2**63 else self.total

    def __add__(self, other: ConsumedDigest) -> ConsumedDigest:
        return ConsumedDigest(self.count + other.count, (self.total + other.total) % 2**64)

    def __str__(self) -> str:
        return f"{self.count}-{self.total:016x}"
