"""A data set opened for reading: sample ids in, checked JPEG bytes out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

from pipeline.errors import DatasetError
from pipeline.manifest import Manifest
from pipeline.shard_index import NO_LABEL, ShardIndex, sha256
from pipeline.shards import index_url, tar_url
from pipeline.storage import Storage

INDEX_CACHE_BYTES = 256 << 20
LONGEST_READ_BYTES = 32 << 20

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One image as it lies in its shard."""

    id: int
    """Its place in the data set, from 0."""
    key: str
    shard: str
    data: bytes
    """A JPEG whose CRC32C has been checked."""
    label: int | None


class Dataset:
    """The shards of one manifest.

    Owns: an LRU of shard indexes, bounded in bytes; no image.
    Concurrency: safe to call from several threads.
    Blocking: read() does I/O, as long as Storage retries.
    """

    def __init__(
        self, storage: Storage, url: str, manifest: Manifest, index_cache_bytes: int = INDEX_CACHE_BYTES
    ) -> None:
        self.storage = storage
        self.url = url
        self.manifest = manifest
        self.digest = manifest.digest
        self._ends = np.cumsum([shard.samples for shard in manifest.shards], dtype=np.int64)
        self._indexes = _IndexCache(index_cache_bytes)

    @classmethod
    def open(cls, storage: Storage, url: str) -> Dataset:
        """Read the manifest; indexes follow when they are needed.

        Raises:
            DatasetError: No manifest there, or an unreadable one.
            StorageError: The URL cannot be reached.
        """
        url = Storage.absolute(url)
        return cls(storage, url, Manifest.load(storage, url))

    def __len__(self) -> int:
        return self.samples

    @property
    def samples(self) -> int:
        """N; ids run from 0 to N - 1."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def mean_sample_bytes(self) -> float:
        """Bytes of tar per sample."""
        return self.manifest.tar_bytes / max(1, self.samples)

    def read(self, sample_ids: Sequence[int] | Int64s) -> list[Sample]:
        """Read samples by ranged requests; neighbours in a shard share one.

        Args:
            sample_ids: Distinct or not, in any order.

        Returns:
            One sample for each id, in the order of the ids.

        Raises:
            DatasetError: A byte differs from what was ingested; names shard, key and offset.
        """
        ids = np.asarray(sample_ids, np.int64)
        unique = np.unique(ids)
        shards = np.searchsorted(self._ends, unique, side="right")
        found: dict[int, Sample] = {}
        for shard in np.unique(shards).tolist():
            found |= self._read_shard(shard, unique[shards == shard])
        return [found[sample] for sample in ids.tolist()]

    def index(self, shard: int) -> ShardIndex:
        """The index of the shard with that place in the manifest."""
        return self._indexes.get(shard, self._load_index)

    def _load_index(self, shard: int) -> ShardIndex:
        entry = self.manifest.shards[shard]
        url = index_url(self.url, entry.name)
        try:
            data = self.storage.read(url)
        except FileNotFoundError:
            raise _altered("index", url, "it is missing") from None
        if sha256(data) != entry.index_sha256:
            raise _altered("index", url, "its SHA-256 is not the manifest's")
        return ShardIndex.from_bytes(data, url)

    def _read_shard(self, shard: int, ids: Int64s) -> dict[int, Sample]:
        index = self.index(shard)
        first_id = int(self._ends[shard]) - len(index)
        url = tar_url(self.url, index.shard)
        samples: dict[int, Sample] = {}
        for rows in _neighbours(ids - first_id, index):
            start = int(index.offsets[rows[0]])
            length = int(index.offsets[rows[-1]] + index.lengths[rows[-1]]) - start
            try:
                data = memoryview(self.storage.read_range(url, start, length))
            except FileNotFoundError:
                raise _altered("shard", url, "it is missing") from None
            for row in rows:
                begin = int(index.offsets[row]) - start
                image = bytes(data[begin : begin + int(index.lengths[row])])
                samples[first_id + row] = _checked(index, row, image, first_id, url)
        return samples


def _checked(index: ShardIndex, row: int, image: bytes, first_id: int, url: str) -> Sample:
    key, length = index.keys[row].decode(), int(index.lengths[row])
    if len(image) != length or google_crc32c.value(image) != int(index.crcs[row]):
        fault = "end early" if len(image) != length else "do not have the CRC32C of the index"
        raise _altered("shard", url, f"the {length} bytes of {key}.jpg at offset {index.offsets[row]} {fault}")
    label = int(index.labels[row])
    return Sample(first_id + row, key, index.shard, image, None if label == NO_LABEL else label)


def _altered(what: str, url: str, why: str) -> DatasetError:
    return DatasetError(what, "must be as it was ingested", url, f"{why}; restore it, or shard the data set again")


def _neighbours(rows: Int64s, index: ShardIndex) -> list[list[int]]:
    """Runs of consecutive rows, ascending; between two images lie only headers and labels."""
    runs: list[list[int]] = []
    for row in rows.tolist():
        if runs and row == runs[-1][-1] + 1:
            span_bytes = int(index.offsets[row] + index.lengths[row] - index.offsets[runs[-1][0]])
            if span_bytes <= LONGEST_READ_BYTES:
                runs[-1].append(row)
                continue
        runs.append([row])
    return runs


class _IndexCache:
    """LRU of shard indexes; a miss is loaded by one thread while others with the same miss wait."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[int, ShardIndex] = OrderedDict()
        self._loading: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, shard: int, load: Callable[[int], ShardIndex]) -> ShardIndex:
        with self._lock:
            if shard in self._held:
                self._held.move_to_end(shard)
                return self._held[shard]
            turn = self._loading.setdefault(shard, threading.Lock())
        with turn:
            with self._lock:
                if shard in self._held:
                    return self._held[shard]
            index = load(shard)
            with self._lock:
                self._held[shard] = index
                self._loading.pop(shard, None)
                while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._limit_bytes:
                    self._held.popitem(last=False)
        return index
