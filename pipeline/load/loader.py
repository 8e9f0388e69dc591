"""The loader of one rank: has images read ahead, decoded and augmented, and gives batches in order.

That is done by threads of the rank's process, or by processes beside it. Batches stay integers of 8 or 16 bits until
they are on the device. What a batch holds depends on (dataset, order, seed, step, rank, world size), and on which
samples are unusable, alone.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Generator, Mapping

import torch

from pipeline.errors import OrderError
from pipeline.image.augment import Augmentation, RandomCrops
from pipeline.image.channels import RGB_CHANNELS
from pipeline.load.batch import Batch, StartedBatch
from pipeline.load.batch_plan import BatchPlan
from pipeline.load.dataset import Dataset
from pipeline.load.decode_threads import DecodeThreads
from pipeline.load.device_copy import DeviceCopy
from pipeline.load.image_maker import BadSamplePolicy, Substitution
from pipeline.load.processes.loader_processes import LoaderProcesses
from pipeline.load.read_ahead import OPEN_BYTES
from pipeline.load.stall_watch import STALL_SECONDS, StallWatch
from pipeline.order.sample_order import Order

logger = logging.getLogger(__name__)


class Loader:
    """A source of one rank's batches.

    Owns: nothing between calls; each batches() has its own threads or processes.
    Failure: the first error of any of them surfaces where the batch would have been.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        image_shape: tuple[int, int] | Mapping[int, tuple[int, int]],
        channels: int = RGB_CHANNELS,
        rank: int,
        world_size: int,
        seed: int,
        threads: int,
        in_processes: bool = False,
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
            image_shape: Height and width of the images, in pixels; or those from each epoch on where they change, by
                the epoch, from 0. Batches are read ahead across epochs whatever their sizes.
            channels: To which images are decoded.
            rank: Of this process, in [0, world_size).
            world_size: Number of processes that share a step.
            seed: Of the augmentation.
            threads: That decode.
            in_processes: Give each of these a process of its own, instead of having all in this one.
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
        self._threads = threads
        self._in_processes = in_processes
        self._prefetch_batches = prefetch_batches
        self._device = device or torch.device("cpu")
        self._stall_seconds = stall_seconds
        lanes = order.rank_lanes(rank, world_size)
        window_bytes = int(len(lanes) * order.window_samples * dataset.mean_sample_bytes)
        self._plan = BatchPlan(
            order,
            lanes,
            dataset.pixel_kind(channels),
            dict(image_shape) if isinstance(image_shape, Mapping) else {0: image_shape},
            seed=seed,
            policy=policy or BadSamplePolicy(),
            augmentation=augmentation or RandomCrops(),
            whole_windows=min(window_bytes, dataset.manifest.tar_bytes) <= open_bytes,
        )
        if not self._plan.whole_windows:
            logger.warning(
                "windows of %d bytes exceed open_bytes %d: reading sample by sample", window_bytes, open_bytes
            )

    def batches(self, start_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """Batches of steps [start_step, stop_step), in order.

        Closing the generator, or leaving it to the garbage collector, ends its threads and processes.

        Raises:
            DatasetError: A sample is not as it was ingested, and the policy is to fail; or too many are not.
            StorageError: The store was unreachable for longer than Storage retries.
            StalledError: No batch came for `stall_seconds`; names stage, shard and image.
            LoaderProcessError: Loader processes die again and again, and no image is to blame.
        """
        if start_step >= stop_step:
            return
        device_copy = DeviceCopy(self._device)
        makers = self._makers(range(start_step, stop_step), device_copy)
        watch = StallWatch(self._stall_seconds, makers)
        started: deque[StartedBatch] = deque()
        bad_runs: Counter[int] = Counter()
        try:
            for step in range(start_step, stop_step):
                started.append(makers.start(step))
                if step == start_step:  # the first batch comes first; only then may what follows compete
                    watch.wait(started[0], time.monotonic())
                if len(started) > self._prefetch_batches:
                    yield self._finish(started.popleft(), watch, device_copy, bad_runs)
            while started:
                yield self._finish(started.popleft(), watch, device_copy, bad_runs)
        finally:
            makers.close()

    def _makers(self, steps: range, device_copy: DeviceCopy) -> DecodeThreads | LoaderProcesses:
        if not self._in_processes:
            return DecodeThreads(self._dataset, self._plan, steps, device_copy, threads=self._threads)
        slots = self._prefetch_batches + 1
        return LoaderProcesses(self._dataset, self._plan, steps, device_copy, processes=self._threads, slots=slots)

    def _finish(self, batch: StartedBatch, watch: StallWatch, device_copy: DeviceCopy, bad_runs: Counter[int]) -> Batch:
        began = time.monotonic()
        watch.wait(batch, began)
        sent = batch.sent.result()
        images = device_copy.finish(sent.copy)
        self._count_bad(batch.substitutions, bad_runs)
        wait_seconds = time.monotonic() - began
        return Batch(
            batch.step,
            self._plan.order.epoch(batch.step),
            batch.sample_ids,
            images,
            wait_seconds,
            sent.crops,
            tuple(substitution for substitution in batch.substitutions if substitution),
            wait_seconds * batch.read_seconds / (batch.read_seconds + batch.decode_seconds),
        )

    def _count_bad(self, substitutions: list[Substitution | None], bad_runs: Counter[int]) -> None:
        """Stop where too many samples in a row of one lane were replaced, the same at every world size."""
        policy, plan = self._plan.policy, self._plan
        for place, substitution in enumerate(substitutions):
            lane = plan.lanes[place // plan.order.lane_batch_size]
            bad_runs[lane] = bad_runs[lane] + 1 if substitution else 0
            if substitution and bad_runs[lane] > policy.max_consecutive:
                raise policy.too_many(substitution.bad)
