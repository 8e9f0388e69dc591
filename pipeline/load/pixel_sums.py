"""One task of measuring a data set: the sums of the pixels of some images of a shard."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.image.channels import RGB_PIXELS, PixelKind
from pipeline.image.decode import decode
from pipeline.load.bad_sample import BadSample
from pipeline.load.dataset import Dataset
from pipeline.shard.manifest import UNMEASURED_VERSION, Manifest
from pipeline.shard.pixel_statistics import PixelSums
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage

_AT_ONCE = 64
"""Images in memory."""


@dataclass(frozen=True)
class PixelTask:
    """Which images of one shard to measure."""

    entry: ShardEntry
    places: tuple[int, ...]
    """Of the images in the shard, ascending."""
    pixels: PixelKind = RGB_PIXELS
    """To what images are decoded."""


def shard_sums(storage: Storage, url: str, task: PixelTask) -> PixelSums:
    """Sums over the images of a task; those that are damaged or do not decode are left out.

    Args:
        storage: Reaches the data set.
        url: Of the data set, which need not have a manifest yet.
        task: Which images.
    """
    alone = Manifest(UNMEASURED_VERSION, "", (), 0, ShardTable.of([task.entry]))
    dataset = Dataset(storage, url, alone)
    sums = PixelSums.none(task.pixels)
    for first in range(0, len(task.places), _AT_ONCE):
        for found in dataset.read_each(task.places[first : first + _AT_ONCE]):
            if isinstance(found, BadSample):
                continue
            try:
                pixels = decode(found.data, task.pixels.channels, task.pixels.bits)
            except ValueError:
                continue
            sums += PixelSums.of(pixels)
    return sums
