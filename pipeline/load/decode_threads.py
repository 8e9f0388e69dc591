"""Threads of the rank's own process that make its batches.

simplejpeg and torch release the interpreter's lock; what is left of it they share with the thread that trains.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch

from pipeline.host.daemon_threads import DaemonThreads
from pipeline.image.augment import CropRow, Draws
from pipeline.image.decode import Pixels
from pipeline.load.batch import SentBatch, StartedBatch, Unfinished
from pipeline.load.batch_plan import BatchPlan
from pipeline.load.dataset import Dataset
from pipeline.load.device_copy import DeviceCopy
from pipeline.load.read_ahead import Pending, ReadAhead
from pipeline.load.stall_watch import log_thread_stacks
from pipeline.load.thread_activity import Stage

READ_THREADS = 8


class DecodeThreads:
    """The makers of one rank's batches for some steps.

    Owns: its threads, until close(); which samples are known to be unusable.
    """

    def __init__(
        self, dataset: Dataset, plan: BatchPlan, steps: range, device_copy: DeviceCopy, *, threads: int
    ) -> None:
        """Start the threads.

        Args:
            dataset: Where the images are.
            plan: What batches there are.
            steps: That will be started, in turn.
            device_copy: Takes what is ready.
            threads: Decoding ones.
        """
        self._dataset = dataset
        self._plan = plan
        self._device_copy = device_copy
        self._maker = plan.image_maker(dataset, {})
        self._readers = DaemonThreads(READ_THREADS, "convmae-read")
        self._decoders = DaemonThreads(threads, "convmae-decode")
        self._ahead = ReadAhead(dataset, plan.order, plan.lanes, steps, self._readers, whole_windows=plan.whole_windows)

    def start(self, step: int) -> StartedBatch:
        """Begin to read and decode the next batch."""
        pending, plan = self._ahead.request(step), self._plan
        sample_ids = np.array([item.sample_id for item in pending])
        images = _Images(pending, plan.draws(step, sample_ids), plan, step, self._device_copy)
        on_host = self._device_copy.empty((len(pending),), torch.int64)
        on_host[:] = torch.from_numpy(sample_ids)
        batch = StartedBatch(step, on_host, parts=len(pending), send=images.send, unfinished=images.unfinished)
        for place in range(len(pending)):
            self._decoders.start(partial(self._fill, batch, images, place))
        return batch

    def oldest(self, stage: Stage) -> str:
        """The activity that has taken longest in a stage, for messages."""
        return self._dataset.activities.oldest(stage)

    def log_stacks(self) -> None:
        """Log where each thread is."""
        log_thread_stacks()

    def close(self) -> None:
        """End the threads."""
        # Decoders wait for readers, so what was not read yet is cancelled first.
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)
        self._readers.shutdown()

    def _fill(self, batch: StartedBatch, images: _Images, place: int) -> None:
        try:
            began = time.monotonic()
            found = images.pending[place].result()
            read_at = time.monotonic()
            epoch = self._plan.order.epoch(batch.step)
            draws, pixels, crop = images.draws[place], images.pixels[place], images.crops[place]
            substitution = self._maker.fill(epoch, found, draws, pixels, crop)
            images.done[place] = True
            replaced = [(place, substitution)] if substitution else []
            decode_seconds = time.monotonic() - read_at
            batch.part_done(replaced, read_seconds=read_at - began, decode_seconds=decode_seconds)
        except BaseException as error:
            batch.fail(error)


class _Images:
    """Where the threads write a batch."""

    def __init__(
        self, pending: list[Pending], draws: Draws, plan: BatchPlan, step: int, device_copy: DeviceCopy
    ) -> None:
        self.pending = pending
        self.draws = draws
        """(n, ...), of the images' crops."""
        self._host = device_copy.empty(
            (len(pending), *plan.shape(step)), torch.uint8 if plan.dtype == np.uint8 else torch.uint16
        )
        self.pixels: Pixels = self._host.numpy()
        """The same memory."""
        self.crops: CropRow = np.zeros((len(pending), 5), dtype=np.int32)
        self.done = [False] * len(pending)
        self._device_copy = device_copy

    def send(self) -> SentBatch:
        return SentBatch(self._device_copy.start(self._host), self.crops)

    def unfinished(self) -> list[Unfinished]:
        left = [item for item, done in zip(self.pending, self.done, strict=True) if not done]
        return [Unfinished(item.sample_id, item.block.done()) for item in left]
