"""Features of samples, by tasks on a cluster or in threads of this process: the same bits from any number of them.

Samples are cut into batches by their place in the list alone. A batch is computed by one thread of PyTorch, so its bits
depend neither on the task that it falls into nor on the cores of the node.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.cluster.fan_out import GPU_TASK_CPUS, FanOut, Progress, fan_out, fan_out_locally
from jobs.evaluate.encoder import Float32s, FrozenEncoder, encode, one_thread
from jobs.run.shared_folder import manifest_landmarks
from pipeline.errors import DatasetError
from pipeline.load.center_crops import center_crops
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage

BATCH_SIZE = 64
"""Part of what features are: another one gives other last bits."""
TASK_BATCHES = 8
"""Batches of a task: so many that starting it costs little beside them."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeaturePlan:
    """How features are computed."""

    batch_size: int = BATCH_SIZE
    task_batches: int = TASK_BATCHES
    device: str = "cpu"
    """`cpu` or `cuda`."""


@dataclass(frozen=True, eq=False)
class FeatureTask:
    """Some consecutive batches of the list."""

    first: int
    """Place of its first sample in the list."""
    sample_ids: Int64s
    dataset_digest: str
    encoder: Any
    """A FrozenEncoder, or Ray's reference to one."""
    plan: FeaturePlan
    threads: int
    """That decode."""


def features(
    storage: Storage,
    url: str,
    sample_ids: Int64s,
    encoder: FrozenEncoder,
    *,
    dataset_digest: str,
    plan: FeaturePlan,
    runner: Runner,
    on_progress: Callable[[Progress], None],
) -> Float32s:
    """Features of samples, (n, C), in the order of their ids.

    Args:
        storage: Reaches the dataset, from every node that takes part.
        url: Of the dataset.
        sample_ids: (n,), distinct and ascending, so that neighbours in a shard share a request.
        encoder: Gives the features.
        dataset_digest: That the dataset at `url` must have.
        plan: Batches, and the device.
        runner: Where tasks run.
        on_progress: Called in this process, with samples done.

    Raises:
        DatasetError: A sample is not as it was ingested, or the dataset was replaced.
    """
    found = np.empty((len(sample_ids), encoder.channels), np.float32)
    size = plan.batch_size * plan.task_batches
    starts = range(0, len(sample_ids), size)
    progress = Progress(total=len(starts))
    shared = runner.share(encoder)
    tasks = (
        FeatureTask(start, sample_ids[start : start + size], dataset_digest, shared, plan, runner.decode_threads)
        for start in starts
    )

    def tick() -> None:
        on_progress(progress)

    with one_thread():  # which the threads of this process begin with
        for first, part in runner.fan_out(embedded, storage, url, tasks, on_tick=tick):
            found[first : first + len(part)] = part
            progress = progress.after(kept=False, samples=len(part), bad=0)
    return found


def embedded(storage: Storage, url: str, task: FeatureTask) -> tuple[int, Float32s]:
    """Features of one task's samples, and the place of the first; runs wherever tasks run."""
    with one_thread():
        dataset = _opened(storage, url, task.dataset_digest)
        size = task.plan.batch_size
        groups = [task.sample_ids[start : start + size] for start in range(0, len(task.sample_ids), size)]
        encoder = _received(task.encoder)
        batches = center_crops(
            dataset, groups, encoder.image_shape, threads=task.threads, channels=encoder.config.in_channels
        )
        return task.first, np.concatenate([encode(encoder, pixels, task.plan.device) for pixels in batches])


def _received(encoder: Any) -> FrozenEncoder:
    if isinstance(encoder, FrozenEncoder):
        return encoder
    import ray

    received = ray.get(encoder)
    assert isinstance(received, FrozenEncoder)
    return received


@functools.lru_cache(maxsize=2)
def _opened(storage: Storage, url: str, digest: str) -> Dataset:
    """The dataset, once in a process: its manifest may list 200,000 shards."""
    dataset = Dataset.open(storage, url, check_etags=False)
    if dataset.digest != digest:
        remedy = "evaluate again, when nothing writes there"
        raise DatasetError("dataset", "must stay as it is while it is evaluated", url, remedy)
    return dataset


@dataclass(frozen=True)
class Runner:
    """Where tasks run."""

    fan_out: FanOut
    share: Callable[[FrozenEncoder], Any]
    """Makes of the encoder what tasks are given: on a cluster it is sent to each node once."""
    decode_threads: int


def here(*, on_gpu: bool = False, width: int | None = None) -> Runner:
    """Threads of this process.

    Args:
        on_gpu: They share a GPU, so that one task at a time is enough, whose images all cores decode.
        width: Tasks at once; None: one for each core.
    """
    cores = len(os.sched_getaffinity(0))
    tasks, decoders = (1, cores) if on_gpu else (cores, 1)
    return Runner(functools.partial(fan_out_locally, width=width or tasks), lambda encoder: encoder, decoders)


def on_cluster(storage: Storage, urls: Sequence[str], *, on_gpu: bool) -> Runner:
    """Tasks on the cluster, to which this process is connected.

    Args:
        storage: Reaches the datasets.
        urls: Of the datasets; those on local disks must be seen by every node.
        on_gpu: A task takes a GPU.
    """
    import ray

    landmarks = tuple(mark for url in urls for mark in manifest_landmarks(storage, url))
    tasks = functools.partial(fan_out, landmarks=landmarks, on_gpu=on_gpu)
    return Runner(tasks, ray.put, GPU_TASK_CPUS if on_gpu else 1)
