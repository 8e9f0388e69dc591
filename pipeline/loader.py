"""Batches of one rank: read ahead, decode and augment in threads, hand over in order.

Threads, not processes: simplejpeg and torch release the GIL, and neither s3fs nor DeepSpeed survives a fork. Batches
stay uint8 until they are on the device. What a batch holds depends on (data set, order, seed, step, rank,
world size) alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pipeline.augment import augmented, random_crop
from pipeline.dataset import Dataset
from pipeline.decode import Pixels, decode
from pipeline.errors import DatasetError, OrderError
from pipeline.order import Order
from pipeline.read_ahead import OPEN_BYTES, Pending, ReadAhead

logger = logging.getLogger(__name__)

READ_THREADS = 8


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a step."""

    step: int
    epoch: int
    sample_ids: torch.Tensor
    """(n,) int64; lane after lane."""
    images: torch.Tensor
    """(n, 3, H, W) uint8."""
    wait_seconds: float
    """How long the consumer waited for it; near zero where loading keeps up."""


@dataclass
class _Started:
    """A batch on its way."""

    step: int
    sample_ids: torch.Tensor
    images: torch.Tensor
    decoding: list[Future[None]]


class Loader:
    """Makes one rank's batches.

    Owns: nothing between calls; each batches() has its own threads and closes them.
    Failure: the first error of any thread surfaces where the batch would have been.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        image_shape: tuple[int, int],
        rank: int,
        world_size: int,
        seed: int,
        threads: int,
        prefetch_batches: int = 2,
        open_bytes: int = OPEN_BYTES,
    ) -> None:
        """Decide how to read; does no I/O.

        Args:
            dataset: Where the images are.
            order: Which of them make up a step; must be over this data set.
            image_shape: Height and width of the images, in pixels.
            rank: Of this process, in [0, world_size).
            world_size: Number of processes that share a step.
            seed: Of crops and flips.
            threads: Decode threads.
            prefetch_batches: Batches that are worked on ahead of the consumer.
            open_bytes: Memory for read, undecoded images. If a rank's open windows need more, samples are read one by
                one, with many more requests.

        Raises:
            OrderError: The order is over another number of samples.
        """
        if order.samples != dataset.samples:
            remedy = "make the order from the data set that it reads"
            raise OrderError("samples", f"must be the data set's {dataset.samples}", order.samples, remedy)
        self._dataset = dataset
        self._order = order
        self._image_shape = image_shape
        self._lanes = order.rank_lanes(rank, world_size)
        self._seed = seed
        self._threads = threads
        self._prefetch_batches = prefetch_batches
        window_bytes = int(len(self._lanes) * order.window_samples * dataset.mean_sample_bytes)
        self._whole_windows = min(window_bytes, dataset.manifest.tar_bytes) <= open_bytes
        if not self._whole_windows:
            logger.warning(
                "windows of %d bytes exceed open_bytes %d: reading sample by sample", window_bytes, open_bytes
            )

    def batches(self, start_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """Batches of steps [start_step, stop_step), in order.

        Closing the generator, or leaving it to the garbage collector, ends its threads.

        Raises:
            DatasetError: A sample is not as it was ingested.
            StorageError: The storage stayed away for longer than Storage retries.
        """
        if start_step >= stop_step:
            return
        readers = ThreadPoolExecutor(READ_THREADS, "convmae-read")
        decoders = ThreadPoolExecutor(self._threads, "convmae-decode")
        steps = range(start_step, stop_step)
        ahead = ReadAhead(self._dataset, self._order, self._lanes, steps, readers, whole_windows=self._whole_windows)
        started: deque[_Started] = deque()
        try:
            for step in steps:
                started.append(self._start(step, ahead, decoders))
                if len(started) > self._prefetch_batches:
                    yield self._finish(started.popleft())
            while started:
                yield self._finish(started.popleft())
        finally:
            # Decoders wait for readers, so what was not read yet is cancelled first.
            readers.shutdown(wait=False, cancel_futures=True)
            decoders.shutdown(cancel_futures=True)
            readers.shutdown()

    def _start(self, step: int, ahead: ReadAhead, decoders: ThreadPoolExecutor) -> _Started:
        pending = ahead.request(step)
        images = torch.empty((len(pending), 3, *self._image_shape), dtype=torch.uint8)
        epoch, pixels = self._order.epoch(step), images.numpy()
        decoding = [decoders.submit(self._fill, epoch, item, pixels[place]) for place, item in enumerate(pending)]
        return _Started(step, torch.tensor([item.sample_id for item in pending]), images, decoding)

    def _fill(self, epoch: int, pending: Pending, out: Pixels) -> None:
        sample = pending.result()
        try:
            pixels = decode(sample.data)
        except ValueError as error:
            name = f"{sample.shard}/{sample.key}.jpg"
            raise DatasetError(
                "sample", "must be a whole JPEG", name, f"leave it out and shard again ({error})"
            ) from error
        crop = random_crop(self._seed, epoch, sample.id, *pixels.shape[:2])
        out[:] = augmented(pixels, crop, self._image_shape)

    def _finish(self, batch: _Started) -> Batch:
        began = time.monotonic()
        for future in batch.decoding:
            future.result()
        wait_seconds = time.monotonic() - began
        return Batch(batch.step, self._order.epoch(batch.step), batch.sample_ids, batch.images, wait_seconds)
