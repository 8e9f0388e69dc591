"""The plan of which images go into which shard: shuffled once by a seed, then cut by number or by bytes.

Since they are shuffled here, neighbours in a shard are unrelated, so that a block read in one piece is already mixed.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from pipeline.access.places import Given, Listed
from pipeline.errors import SourceError
from pipeline.image.channels import RGB_CHANNELS, PixelKind
from pipeline.image.photo import ORIGINAL, Encoding
from pipeline.ingest.source import Source, Sources, Tars
from pipeline.order import hashing
from pipeline.shard.manifest import channel_marks

SHARD_VERSION = 3
"""Part of every sources digest: shards written under other rules are not kept."""

_SHUFFLE = 0x53484152
_MEASURED_AT_ONCE = 1 << 16
_HEADER_BYTES = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Sharding:
    """The way in which sources become shards. Exactly one of samples_per_shard and shard_bytes is given."""

    samples_per_shard: int | None = None
    """Images in a shard; the last one is smaller."""
    shard_bytes: int | None = None
    """Most bytes of a tar, if its images keep theirs."""
    seed: int = 0
    """Of the shuffle."""
    encoding: Encoding = ORIGINAL

    def __post_init__(self) -> None:
        sizes = {"samples_per_shard": self.samples_per_shard, "shard_bytes": self.shard_bytes}
        given = {name: size for name, size in sizes.items() if size is not None}
        if len(given) != 1:
            raise SourceError("shard size", "must be a number of samples or of bytes", given, "give one of the two")
        for name, size in given.items():
            if size < 1:
                raise SourceError(name, "must be at least 1", size, "give a larger one")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**asdict(self), "encoding": self.encoding.to_json()}


@dataclass(frozen=True)
class Ingest:
    """The sources of a dataset, and how it is made of them."""

    found: Sources | Tars
    sharding: Sharding
    channels: int = RGB_CHANNELS
    """To which photographs are to be decoded; their bytes do not depend on it."""

    @property
    def pixels(self) -> PixelKind:
        """To what images are to be decoded."""
        return self.sharding.encoding.bands or PixelKind(self.channels)

    @property
    def digest(self) -> str:
        """Two ingests with one digest make the same dataset."""
        digest = hashlib.sha256(json.dumps([SHARD_VERSION, self.sharding.to_json()]).encode())
        if isinstance(self.found, Tars):
            rows: Iterator[list[Any]] = ([_identity(tar.path), tar.size_bytes] for tar in self.found.tars)
        else:
            digest.update(json.dumps(self.found.classes).encode())
            rows = ([_identity(image.path), image.size_bytes, image.label] for image in self.found.images)
        for row in rows:
            digest.update(json.dumps(row).encode())
        for mark in channel_marks(self.pixels):
            digest.update(mark.digest.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardTask:
    """The work of one task: some sources, in this order."""

    name: str
    """Without a suffix, like ``shard-000012``."""
    root: str
    first_key: int
    sources: tuple[Source, ...]
    encoding: Encoding = ORIGINAL

    @property
    def digest(self) -> str:
        """Identifies the sources, their order and encoding; two tasks with one digest write the same shard."""
        rows = [[_identity(source.path), source.size_bytes, source.label, source.offset] for source in self.sources]
        parts = [SHARD_VERSION, self.first_key, self.encoding.to_json(), rows]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _identity(path: Listed | Given) -> str | list[str]:
    """A path in a digest. A listed name that spells an address is marked: shards made of that address are not kept."""
    spells_an_address = isinstance(path, Listed) and (path.text.startswith("/") or "://" in path.text)
    return ["listed", path.text] if spells_an_address else path.text


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
        """The images at places [start, stop) of the shuffled order."""
        return hashing.permuted(self._stream, self.samples, np.arange(start, stop))


def plan_shards(sources: Sources, sharding: Sharding) -> ShardPlan:
    """Shuffle the sources and cut them into tasks. To cut by bytes, the sources' sizes must be known."""
    if sharding.samples_per_shard is not None:
        starts = np.arange(0, len(sources.images), sharding.samples_per_shard)
        return ShardPlan(sources, starts, sharding.seed, sharding.encoding)
    assert sharding.shard_bytes is not None
    order = ShardPlan(sources, np.zeros(0, np.int64), sharding.seed, sharding.encoding)
    starts = np.array(list(_starts(order, sharding.shard_bytes)), np.int64)
    return ShardPlan(sources, starts, sharding.seed, sharding.encoding)


def _starts(order: ShardPlan, shard_bytes: int) -> Iterator[int]:
    """Places at which a new shard begins, so that none is larger; one image alone may be."""
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
    """Bytes that an image and its label take in a tar."""
    assert source.size_bytes is not None
    image = _HEADER_BYTES + -(-source.size_bytes // _HEADER_BYTES) * _HEADER_BYTES
    return image + (0 if source.label is None else 2 * _HEADER_BYTES)
