"""A data set opened for reading: sample ids in, checked JPEG bytes out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

from pipeline.errors import DatasetError
from pipeline.index_reader import INDEX_CACHE_BYTES, IndexReader, SampleRow
from pipeline.manifest import Manifest
from pipeline.shard_index import NO_LABEL, ShardIndex
from pipeline.storage import Storage

INDEX_THREADS = 32
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

    Owns: an LRU of index pages, bounded in bytes; no image.
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
        self._ends = np.cumsum(manifest.shards.samples)
        self._starts = self._ends - manifest.shards.samples
        self._indexes = IndexReader(storage, url, manifest.shards, index_cache_bytes)

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
        found: dict[int, Sample] = {}
        for shard, rows in itertools.groupby(self.rows(np.unique(ids)), key=lambda sample: sample.shard):
            found |= self._read_shard(shard, list(rows))
        return [found[sample] for sample in ids.tolist()]

    def rows(self, sample_ids: Sequence[int] | Int64s) -> list[SampleRow]:
        """What the indexes say of some samples: key, place in the tar, CRC32C, size, label. No image byte is read.

        Reads the pages of the indexes that hold these rows, those of several shards at once.

        Args:
            sample_ids: Distinct or not, in any order.

        Returns:
            One row for each id, in the order of the ids.

        Raises:
            DatasetError: An index is missing, damaged, or not the one that the manifest names.
        """
        ids = np.asarray(sample_ids, np.int64)
        groups = self._by_shard(np.unique(ids))
        cold = [group for group in groups if not self._indexes.holds(*group)]
        together = cold if len(cold) > 1 else []  # a block alone is already one of many that are read at once
        found: dict[int, SampleRow] = {}
        if together:
            with ThreadPoolExecutor(min(INDEX_THREADS, len(together)), "convmae-index") as threads:
                for rows in threads.map(lambda group: self._shard_rows(*group), together):
                    found |= rows
        done = {shard for shard, _ in together}
        for shard, places in groups:
            if shard not in done:
                found |= self._shard_rows(shard, places)
        return [found[sample] for sample in ids.tolist()]

    def _by_shard(self, ids: Int64s) -> list[tuple[int, Int64s]]:
        """Shards that ascending ids lie in, each with their places in it."""
        shards = np.searchsorted(self._ends, ids, side="right")
        places = ids - self._starts[shards]
        cuts = np.flatnonzero(np.diff(shards)) + 1
        groups = zip(np.split(shards, cuts), np.split(places, cuts), strict=True)
        return [(int(shard[0]), held) for shard, held in groups if len(held)]

    def index(self, shard: int) -> ShardIndex:
        """The whole index of the shard with that place in the manifest; read anew each time.

        Raises:
            DatasetError: It is missing, damaged, or not the one that the manifest names.
        """
        entry = self.manifest.shards[shard]
        url = entry.index_url(self.url)
        try:
            index = ShardIndex.from_bytes(self.storage.read(url), url)
        except FileNotFoundError:
            raise _altered("shard index", url, "it is missing") from None
        if index.digest != entry.index_sha256:
            raise _altered("shard index", url, "it is not the one that the manifest names")
        return index

    def _shard_rows(self, shard: int, places: Int64s) -> dict[int, SampleRow]:
        first_id = int(self._starts[shard])
        rows = self._indexes.rows(shard, places)
        return {
            first_id + place: SampleRow(first_id + place, shard, place, row)
            for place, row in zip(places.tolist(), rows, strict=True)
        }

    def _read_shard(self, shard: int, rows: list[SampleRow]) -> dict[int, Sample]:
        entry = self.manifest.shards[shard]
        url = entry.tar_url(self.url)
        samples: dict[int, Sample] = {}
        for run in _neighbours(rows):
            start = run[0].row.offset
            length = run[-1].row.offset + run[-1].row.length - start
            try:
                data = memoryview(self.storage.read_range(url, start, length))
            except FileNotFoundError:
                raise _altered("shard", url, "it is missing") from None
            for sample in run:
                begin = sample.row.offset - start
                image = bytes(data[begin : begin + sample.row.length])
                samples[sample.id] = _checked(sample, entry.name, image, url)
        return samples


def _checked(sample: SampleRow, shard: str, image: bytes, url: str) -> Sample:
    row = sample.row
    if len(image) != row.length or google_crc32c.value(image) != row.crc:
        fault = "end early" if len(image) != row.length else "do not have the CRC32C of the index"
        raise _altered("shard", url, f"the {row.length} bytes of {row.member} at offset {row.offset} {fault}")
    return Sample(sample.id, row.key, shard, image, None if row.label == NO_LABEL else row.label)


def _altered(what: str, url: str, why: str) -> DatasetError:
    return DatasetError(what, "must be as it was ingested", url, f"{why}; restore it, or shard the data set again")


def _neighbours(rows: list[SampleRow]) -> list[list[SampleRow]]:
    """Runs of samples that follow each other in their shard, ascending; between two images lie headers and labels."""
    runs: list[list[SampleRow]] = []
    for sample in rows:
        if runs and sample.place == runs[-1][-1].place + 1 and sample.row.offset > runs[-1][-1].row.offset:
            span_bytes = sample.row.offset + sample.row.length - runs[-1][0].row.offset
            if span_bytes <= LONGEST_READ_BYTES:
                runs[-1].append(sample)
                continue
        runs.append([sample])
    return runs
