"""The loader of one rank: reads ahead, decodes and augments in threads, and gives batches in order.

Threads, not processes: simplejpeg and torch release the GIL, and neither s3fs nor DeepSpeed survives a fork. Batches
stay integers of 8 or 16 bits until they are on the device. What a batch holds depends on (dataset, order, seed, step,
rank, world size), and on which samples are unusable, alone.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Generator
from functools import partial

import numpy as np
import torch

from pipeline.errors import OrderError
from pipeline.host.daemon_threads import DaemonThreads
from pipeline.image.augment import Augmentation, RandomCrops
from pipeline.image.channels import PHOTOGRAPH_BITS, RGB_CHANNELS
from pipeline.load.batch import Batch, StartedBatch
from pipeline.load.dataset import Dataset
from pipeline.load.device_copy import DeviceCopy
from pipeline.load.image_maker import BadSamplePolicy, ImageMaker, Substitution
from pipeline.load.read_ahead import OPEN_BYTES, ReadAhead
from pipeline.load.stall_watch import STALL_SECONDS, StallWatch
from pipeline.order.sample_order import Order

logger = logging.getLogger(__name__)

READ_THREADS = 8


class Loader:
    """A source of one rank's batches.

    Owns: nothing between calls but which samples are known to be unusable; each batches() has its own threads.
    Failure: the first error of any thread surfaces where the batch would have been.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        image_shape: tuple[int, int],
        channels: int = RGB_CHANNELS,
        rank: int,
        world_size: int,
        seed: int,
        threads: int,
        prefetch_batches: int = 2,
        open_bytes: int = OPEN_BYTES,
        device: torch.device | None = None,
        policy: BadSamplePolicy | None = None,
        stall_seconds: float = STALL_SECONDS,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Decide how to read; does no I/O. Long by its arguments alone.

        Args:
            dataset: Where the images are.
            order: Which of them make up a step; must be over this dataset.
            image_shape: Height and width of the images, in pixels.
            channels: To which images are decoded.
            rank: Of this process, in [0, world_size).
            world_size: Number of processes that share a step.
            seed: Of the augmentation.
            threads: Decode threads.
            prefetch_batches: Batches that are worked on ahead of the consumer, as far as the device.
            open_bytes: Memory for read, undecoded images. If a rank's open windows need more, samples are read one by
                one, with many more requests, unless a disk cache holds the windows.
            device: Where the images go; None: they stay on the host.
            policy: What to do with samples that cannot be used; None: fail.
            stall_seconds: How long the consumer may wait for one batch.
            augmentation: What is made of a decoded image; None: the crops and flips of pretraining.

        Raises:
            OrderError: The order is over another number of samples.
            DatasetError: The data set's images have no such channels.
        """
        if order.samples != dataset.samples:
            remedy = "make the order from the dataset that it reads"
            raise OrderError("samples", f"must be the dataset's {dataset.samples}", order.samples, remedy)
        self._dataset = dataset
        self._order = order
        self._shape = (channels, *image_shape)
        self._dtype = torch.uint8 if dataset.manifest.kind.bits == PHOTOGRAPH_BITS else torch.uint16
        self._seed = seed
        self._lanes = order.rank_lanes(rank, world_size)
        self._threads = threads
        self._prefetch_batches = prefetch_batches
        self._device = device or torch.device("cpu")
        self._policy = policy or BadSamplePolicy()
        self._watch = StallWatch(stall_seconds, dataset.activities)
        self._augmentation = augmentation or RandomCrops()
        self._maker = ImageMaker(
            dataset, order, self._shape, seed=seed, policy=self._policy, augmentation=self._augmentation
        )
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
            DatasetError: A sample is not as it was ingested, and the policy is to fail; or too many are not.
            StorageError: The store was unreachable for longer than Storage retries.
            StalledError: No batch came for `stall_seconds`; names stage, shard and image.
        """
        if start_step >= stop_step:
            return
        readers = DaemonThreads(READ_THREADS, "convmae-read")
        decoders = DaemonThreads(self._threads, "convmae-decode")
        device_copy = DeviceCopy(self._device)
        steps = range(start_step, stop_step)
        ahead = ReadAhead(self._dataset, self._order, self._lanes, steps, readers, whole_windows=self._whole_windows)
        started: deque[StartedBatch] = deque()
        bad_runs: Counter[int] = Counter()
        try:
            for step in steps:
                started.append(self._start(step, ahead, decoders, device_copy))
                if step == start_step:  # the first batch comes first; only then may what follows compete
                    self._watch.wait(started[0], time.monotonic())
                if len(started) > self._prefetch_batches:
                    yield self._finish(started.popleft(), device_copy, bad_runs)
            while started:
                yield self._finish(started.popleft(), device_copy, bad_runs)
        finally:
            # Decoders wait for readers, so what was not read yet is cancelled first.
            readers.shutdown(wait=False, cancel_futures=True)
            decoders.shutdown(cancel_futures=True)
            readers.shutdown()

    def _start(self, step: int, ahead: ReadAhead, decoders: DaemonThreads, device_copy: DeviceCopy) -> StartedBatch:
        pending = ahead.request(step)
        sample_ids = np.array([item.sample_id for item in pending])
        draws = self._augmentation.draws(self._seed, self._order.epoch(step), sample_ids)
        batch = StartedBatch(step, pending, draws, self._shape, device_copy, dtype=self._dtype)
        for place in range(len(pending)):
            decoders.start(partial(self._fill, batch, place))
        return batch

    def _fill(self, batch: StartedBatch, place: int) -> None:
        try:
            began = time.monotonic()
            found = batch.pending[place].result()
            read_at = time.monotonic()
            epoch = self._order.epoch(batch.step)
            draws, pixels, crop = batch.draws[place], batch.pixels[place], batch.crops[place]
            substitution = self._maker.fill(epoch, found, draws, pixels, crop)
            decode_seconds = time.monotonic() - read_at
            batch.image_done(place, substitution, read_seconds=read_at - began, decode_seconds=decode_seconds)
        except BaseException as error:
            batch.fail(error)

    def _finish(self, batch: StartedBatch, device_copy: DeviceCopy, bad_runs: Counter[int]) -> Batch:
        began = time.monotonic()
        self._watch.wait(batch, began)
        images = device_copy.finish(batch.copy.result())
        self._count_bad(batch.substitutions, bad_runs)
        wait_seconds = time.monotonic() - began
        return Batch(
            batch.step,
            self._order.epoch(batch.step),
            batch.sample_ids,
            images,
            wait_seconds,
            batch.crops,
            tuple(substitution for substitution in batch.substitutions if substitution),
            wait_seconds * batch.read_seconds / (batch.read_seconds + batch.decode_seconds),
        )

    def _count_bad(self, substitutions: list[Substitution | None], bad_runs: Counter[int]) -> None:
        """Stop where too many samples in a row of one lane were replaced, the same at every world size."""
        for place, substitution in enumerate(substitutions):
            lane = self._lanes[place // self._order.lane_batch_size]
            bad_runs[lane] = bad_runs[lane] + 1 if substitution else 0
            if substitution and bad_runs[lane] > self._policy.max_consecutive:
                raise self._policy.too_many(substitution.bad)
