"""Which of several processes of one rank reads each sample: whole blocks, so that none is fetched twice.

A pure function of the order and the number of processes, not of the step at which reading began: a process that is
replaced in the middle of an epoch has the share of the one before it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.order.sample_order import Order

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """The blocks of one of several processes; of one process, all."""

    number: int = 0
    """Of the process, in [0, of)."""
    of: int = 1

    def has_range(self, order: Order, epoch: int, lane: int, first: int, last: int) -> npt.NDArray[np.bool_]:
        """(last - first,) whether it has the samples at these positions of a lane's stream in an epoch."""
        parts = [np.empty(0, np.bool_)]
        while first < last:
            window, offset = divmod(first, order.window_samples)
            taken = min(last - first, order.window_samples - offset)
            parts.append(_owners(order, epoch, lane, window, self.of)[offset : offset + taken] == self.number)
            first += taken
        return np.concatenate(parts)

    def has_lane_batch(self, order: Order, step: int, lane: int) -> npt.NDArray[np.bool_]:
        """(b,) whether it has the samples that a lane gives to a step."""
        epoch, step_in_epoch = divmod(step, order.steps_per_epoch)
        first = step_in_epoch * order.lane_batch_size
        return self.has_range(order, epoch, lane, first, first + order.lane_batch_size)


ALL = Share()


@functools.lru_cache(maxsize=2048)
def _owners(order: Order, epoch: int, lane: int, window: int, processes: int) -> Int64s:
    """For each position of a window the number of its process: blocks are dealt in turn, in order of first use.

    Lanes begin with another process each, so that a remainder of blocks does not go to the same one.
    """
    blocks, firsts, of_block = np.unique(
        order.block_of(order.window(epoch, lane, window)), return_index=True, return_inverse=True
    )
    turns = np.empty(len(blocks), np.int64)
    turns[np.argsort(firsts)] = np.arange(len(blocks))
    owners: Int64s = (turns[of_block] + lane) % processes
    owners.flags.writeable = False  # shared by all callers through the cache
    return owners
