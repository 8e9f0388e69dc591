"""A schedule of reads: whole blocks of the windows that are open, each about once an epoch.

While a window is used up, the next one is read at the same pace. So the bytes held stay near one window, and the
requests per step stay even. A run that starts inside a window reads the first batch by itself; with the second batch
it asks for the rest of the window, and for nothing that lies before.

With a disk cache blocks are fetched and kept whole. What the first epoch omits is fetched at its end, so that
later ones find every block of the rank's lanes on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.load.bad_sample import BadSample
from pipeline.load.dataset import Dataset
from pipeline.load.shard_reader import Sample
from pipeline.order.sample_order import Order
from pipeline.order.shares import ALL, Share

OPEN_BYTES = 2 << 30
"""Memory of one rank for images that were read and not used yet, unless the loader is given another limit."""

Int64s = npt.NDArray[np.int64]


Found = dict[int, Sample | BadSample]


@dataclass(frozen=True)
class Pending:
    """A sample that is being read."""

    sample_id: int
    place: int
    """In the rank's batch."""
    block: Future[Found]

    def result(self) -> Sample | BadSample:
        """Wait for the sample, or what is wrong with it, and let go of it; call once."""
        # Each sample is used once an epoch, so that its bytes can go as soon as they have been used.
        return self.block.result().pop(self.sample_id)


class _Window:
    """The blocks of one window in all of a rank's lanes, in order of first use; handed out once."""

    def __init__(self, epoch: int, positions: range, blocks: list[Int64s]) -> None:
        self.epoch = epoch
        self.positions = positions
        self._blocks = blocks
        self._taken = 0

    def take(self, fraction: float) -> list[Int64s]:
        """The blocks that are due when `fraction` of the window should have been read, and were not handed out yet."""
        due = max(self._taken, int(np.ceil(fraction * len(self._blocks))))
        blocks, self._taken = self._blocks[self._taken : due], due
        return blocks


class ReadAhead:
    """A reader of one rank's samples for steps in [start_step, stop_step).

    Owns: the bytes of samples that were read and not used yet.
    Concurrency: request() is called from one thread; reading happens on the executor.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        lanes: range,
        steps: range,
        executor: Executor,
        *,
        whole_windows: bool,
        share: Share = ALL,
    ) -> None:
        """Begin with the first of the steps.

        Args:
            dataset: What is read.
            order: Decides the steps' samples.
            lanes: Of the rank.
            steps: That will be requested.
            executor: Reads.
            whole_windows: Whether there is memory for whole windows.
            share: The blocks that are read here.
        """
        self._dataset = dataset
        self._order = order
        self._lanes = lanes
        self._steps = steps
        self._executor = executor
        self._whole_windows = whole_windows
        self._share = share
        self._reading: dict[tuple[int, int], Future[Found]] = {}
        self._windows = self._all_windows()
        self._current: _Window | None = None
        self._next: _Window | None = next(self._windows, None)

    def request(self, step: int) -> list[Pending]:
        """Start reading what a step needs and what is due by then; steps must be requested in order."""
        epoch = self._order.epoch(step)
        batch = np.concatenate([self._order.lane_batch(step, lane) for lane in self._lanes])
        places = np.flatnonzero(self._owned(step))
        ids = batch[places]
        if not self._whole_windows or step == self._steps.start:
            self._read(epoch, [ids[place : place + 1] for place in range(len(ids))], whole_blocks=False)
        # The window waits for the second step: it is hundreds of times the first batch, and would only delay it.
        if (self._whole_windows or self._dataset.cache) and step != self._steps.start:
            self._advance(epoch, step)
        return [
            Pending(sample, place, self._reading.pop((epoch, sample)))
            for sample, place in zip(ids.tolist(), places.tolist(), strict=True)
        ]

    def _owned(self, step: int) -> npt.NDArray[np.bool_]:
        """(n,) whether each sample of the rank's batch is read here."""
        return np.concatenate([self._share.has_lane_batch(self._order, step, lane) for lane in self._lanes])

    def _advance(self, epoch: int, step: int) -> None:
        last = (step - epoch * self._order.steps_per_epoch + 1) * self._order.lane_batch_size
        while self._next is not None and (self._next.epoch, self._next.positions.start) < (epoch, last):
            self._take(self._next, 1.0)
            self._current, self._next = self._next, next(self._windows, None)
            if self._next is not None and self._next.epoch > self._current.epoch == self._order.epoch(
                self._steps.start
            ):
                self._keep_the_rest(self._current.epoch)
        if self._current is not None and self._next is not None:
            used = (last - self._current.positions.start) / len(self._current.positions)
            self._take(self._next, used)

    def _take(self, window: _Window, fraction: float) -> None:
        blocks = window.take(fraction)
        if self._whole_windows:
            self._read(window.epoch, blocks, whole_blocks=True)
        else:  # there is no memory for them; later reads of single samples find them on the disk
            self._keep([int(self._order.block_of(ids[:1])[0]) for ids in blocks])

    def _read(self, epoch: int, groups: list[Int64s], *, whole_blocks: bool) -> None:
        for ids in groups:
            block = self._order.block_range(int(self._order.block_of(ids[:1])[0])) if self._dataset.cache else None
            future = self._executor.submit(_read_block, self._dataset, ids, block, whole_blocks)
            self._reading.update({(epoch, sample): future for sample in ids.tolist()})

    def _keep_the_rest(self, epoch: int) -> None:
        """Fetch what later epochs will want and this one omitted: blocks that pause, and those of the first batch."""
        if self._dataset.cache:
            batch = np.concatenate([self._order.lane_batch(self._steps.start, lane) for lane in self._lanes])
            first = self._order.block_of(batch[self._owned(self._steps.start)])
            paused = np.concatenate([self._order.paused_blocks(epoch, lane) for lane in self._lanes])
            paused = paused[paused % self._share.of == self._share.number]
            self._keep(np.unique(np.concatenate([first, paused])).tolist())

    def _keep(self, blocks: list[int]) -> None:
        for block in blocks:
            self._executor.submit(self._dataset.keep, self._order.block_range(block))

    def _all_windows(self) -> Iterator[_Window]:
        """Every window that the steps touch, without samples before the second step or after the last."""
        order, b = self._order, self._order.lane_batch_size
        for epoch in range(order.epoch(self._steps.start), order.epoch(self._steps.stop - 1) + 1):
            if self._dataset.cache:
                self._dataset.cache.begin_epoch()
            epoch_start = epoch * order.steps_per_epoch
            first = max(0, (self._steps.start + 1 - epoch_start) * b)
            stop = min(order.steps_per_epoch, self._steps.stop - epoch_start) * b
            while first < stop:
                window_end = (first // order.window_samples + 1) * order.window_samples
                positions = range(first, min(window_end, stop))
                yield _Window(epoch, positions, self._blocks(epoch, positions))
                first = positions.stop

    def _blocks(self, epoch: int, positions: range) -> list[Int64s]:
        found: list[tuple[int, Int64s]] = []
        for lane in self._lanes:
            ids = self._order.lane_range(epoch, lane, positions.start, positions.stop)
            ids = ids[self._share.has_range(self._order, epoch, lane, positions.start, positions.stop)]
            blocks = self._order.block_of(ids)
            _, first_uses = np.unique(blocks, return_index=True)
            found += [(int(use), np.sort(ids[blocks == blocks[use]])) for use in first_uses]
        return [ids for _, ids in sorted(found, key=lambda pair: pair[0])]


def _read_block(dataset: Dataset, ids: Int64s, block: range | None, whole_block: bool) -> Found:
    found = dataset.read_each(ids, block, whole_block=whole_block)
    return {sample.id: sample for sample in found}
