"""Which images go into which shard: shuffled once by a seed, then cut by number or by bytes.

Shuffled here, neighbours in a shard are unrelated, so that a block read in one piece is already mixed.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from pipeline import hashing
from pipeline.errors import SourceError
from pipeline.photo import ORIGINAL, Encoding
from pipeline.source import Source, Sources

SHARD_VERSION = 2
"""Part of every sources digest: shards written under other rules are not kept."""

_SHUFFLE = 0x53484152
_MEASURED_AT_ONCE = 1 << 16
_HEADER_BYTES = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ShardTask:
    """What one task writes: some sources, in this order."""

    name: str
    """Without a suffix, like ``shard-000012``."""
    root: str
    first_key: int
    sources: tuple[Source, ...]
    encoding: Encoding = ORIGINAL

    @property
    def digest(self) -> str:
        """Names the sources, their order and encoding; two tasks with one digest write the same shard."""
        rows = [[source.path, source.size_bytes, source.label, source.offset] for source in self.sources]
        parts = [SHARD_VERSION, self.first_key, asdict(self.encoding), rows]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ShardPlan(Sequence[ShardTask]):
    """The tasks of an ingest, each made when it is asked for: holds one integer a shard, whatever the number of images.

    Immutable.
    """

    def __init__(self, sources: Sources, starts: npt.NDArray[np.int64], seed: int, encoding: Encoding) -> None:
        self.sources = sources
        self.samples = len(sources.images)
        self._starts = starts
        self._stream = hashing.key(_SHUFFLE, seed)
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> ShardTask: ...
    @overload
    def __getitem__(self, place: slice) -> list[ShardTask]: ...
    def __getitem__(self, place: int | slice) -> ShardTask | list[ShardTask]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        start = int(self._starts[number])
        stop = int(self._starts[number + 1]) if number + 1 < len(self) else self.samples
        chosen = tuple(self.sources.images[image] for image in self.places(start, stop).tolist())
        digits = max(6, len(str(len(self) - 1)))  # names sort as numbers do
        return ShardTask(f"shard-{number:0{digits}d}", self.sources.root, start, chosen, self._encoding)

    def __iter__(self) -> Iterator[ShardTask]:
        return (self[number] for number in range(len(self)))

    def places(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Which images have the places [start, stop) of the shuffled order."""
        return hashing.permuted(self._stream, self.samples, np.arange(start, stop))


def plan_shards(
    sources: Sources,
    samples_per_shard: int | None,
    seed: int,
    *,
    shard_bytes: int | None = None,
    encoding: Encoding = ORIGINAL,
) -> ShardPlan:
    """Shuffle the sources and cut them into tasks.

    Args:
        sources: All images.
        samples_per_shard: Images in a shard; the last one is smaller. None to cut by bytes.
        seed: Of the shuffle.
        shard_bytes: What a tar of images that keep their bytes has at most; needs the sizes of the sources.
        encoding: What is done to every image.

    Raises:
        SourceError: There is not exactly one of samples_per_shard and shard_bytes, or it is not positive.
    """
    if (samples_per_shard is None) == (shard_bytes is None):
        value = (samples_per_shard, shard_bytes)
        raise SourceError("shard size", "must be a number of samples or of bytes", value, "give one of the two")
    if (samples_per_shard or shard_bytes or 0) < 1:
        raise SourceError("shard size", "must be at least 1", samples_per_shard or shard_bytes, "give a larger one")
    if samples_per_shard is not None:
        starts = np.arange(0, len(sources.images), samples_per_shard)
        return ShardPlan(sources, starts, seed, encoding)
    assert shard_bytes is not None
    order = ShardPlan(sources, np.zeros(0, np.int64), seed, encoding)
    return ShardPlan(sources, np.array(list(_starts(order, shard_bytes)), np.int64), seed, encoding)


def _starts(order: ShardPlan, shard_bytes: int) -> Iterator[int]:
    """Where a new shard begins, so that none is larger; one image alone may be."""
    room = 0
    for first in range(0, order.samples, _MEASURED_AT_ONCE):
        places = order.places(first, min(order.samples, first + _MEASURED_AT_ONCE))
        for place, image in enumerate(places.tolist(), start=first):
            size = _tar_bytes(order.sources.images[image])
            if size > room or place == 0:
                yield place
                room = shard_bytes // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * _HEADER_BYTES  # the end mark
            room -= size


def _tar_bytes(source: Source) -> int:
    """What an image and its label take in a tar."""
    assert source.size_bytes is not None
    image = _HEADER_BYTES + -(-source.size_bytes // _HEADER_BYTES) * _HEADER_BYTES
    return image + (0 if source.label is None else 2 * _HEADER_BYTES)
