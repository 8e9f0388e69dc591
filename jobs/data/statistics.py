"""Mean and deviation of a data set's pixels, in parallel Ray tasks, one per shard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jobs.cluster.fan_out import Progress, Show, fan_out
from jobs.run.shared_folder import Landmarks, manifest_landmarks
from pipeline.errors import DatasetError
from pipeline.image.channels import PixelKind
from pipeline.load.pixel_sums import PixelTask, shard_sums
from pipeline.shard.manifest import Manifest
from pipeline.shard.pixel_statistics import PixelStatistics, PixelSums, spread_places
from pipeline.store.storage import Storage

SAMPLED_IMAGES = 10_000
"""Of a data set that is being made: of as many photographs the mean is known to about a thousandth, within a minute."""


@dataclass(frozen=True)
class Measurement:
    """The result of measuring a data set."""

    manifest: Manifest
    pixels: PixelStatistics
    seconds: float


def measure_dataset(storage: Storage, url: str, *, samples: int, on_progress: Show) -> Measurement:
    """Measure a data set that exists; writes nothing.

    Ray must be initialised.

    Args:
        storage: Reaches the data set from every node.
        url: Of the data set.
        samples: Most images to read, equally far apart; 0: all.
        on_progress: Called in this process.

    Raises:
        DatasetError: There is no manifest, an unreadable one, or no image that decodes.
    """
    began = time.monotonic()
    manifest = Manifest.load(storage, url)
    landmarks = manifest_landmarks(storage, url)
    pixels = measured_pixels(
        storage,
        url,
        manifest,
        pixels=manifest.kind,
        samples=samples,
        on_progress=on_progress,
        landmarks=landmarks,
    )
    return Measurement(manifest, pixels, time.monotonic() - began)


def measured_pixels(
    storage: Storage,
    url: str,
    manifest: Manifest,
    *,
    pixels: PixelKind,
    samples: int,
    on_progress: Show,
    landmarks: Landmarks,
) -> PixelStatistics:
    """The statistics of a data set whose manifest may not be written yet; a function of its images and `samples`.

    Args:
        storage: Reaches it from every node.
        url: Of the data set.
        manifest: What lies there.
        pixels: To what images are decoded.
        samples: Most images to read; 0: all.
        on_progress: Called in this process.
        landmarks: Of folders on local disks.

    Raises:
        DatasetError: None of the images decodes.
    """
    tasks = list(_tasks(manifest, samples, pixels))
    progress, sums = Progress(total=len(tasks)), PixelSums.none(pixels)

    def tick() -> None:
        on_progress("statistics", progress)

    for found in fan_out(shard_sums, storage, url, tasks, on_tick=tick, landmarks=landmarks):
        sums += found
        progress = progress.after(kept=False, samples=found.images, bad=0)
    if not sums.images:
        remedy = "`convmae verify --deep` says why they do not"
        raise DatasetError("dataset", "must have an image that decodes", url, remedy)
    return sums.statistics()


def _tasks(manifest: Manifest, samples: int, pixels: PixelKind) -> Iterator[PixelTask]:
    """The chosen images, by shard."""
    ends = np.cumsum(manifest.shards.samples)
    chosen = spread_places(manifest.samples, samples)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    for entry, end, part in zip(manifest.shards, ends.tolist(), parts, strict=True):
        if len(part):
            yield PixelTask(entry, tuple((part - (end - entry.samples)).tolist()), pixels)
