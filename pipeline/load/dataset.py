"""A dataset opened for reading: sample ids in, checked bytes of images out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.access.places import normal
from pipeline.errors import DatasetError
from pipeline.image.channels import PixelKind
from pipeline.load.bad_sample import BadSample
from pipeline.load.block_cache import BlockCache, CachePlace
from pipeline.load.read_counters import ReadCounters
from pipeline.load.shard_reader import Sample, ShardReader, neighbours
from pipeline.load.thread_activity import ThreadActivities
from pipeline.shard.index import ShardIndex
from pipeline.shard.index_reader import IndexReader, SampleRow
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

INDEX_THREADS = 32

Int64s = npt.NDArray[np.int64]


class Dataset:
    """The shards of one manifest.

    Owns: an LRU of index pages, bounded in bytes; no image in memory.
    Concurrency: safe to call from several threads.
    Blocking: read() and its like do I/O, as long as Storage retries.
    """

    def __init__(
        self,
        storage: Storage,
        url: str,
        manifest: Manifest,
        *,
        cache: CachePlace | None = None,
        check_etags: bool = True,
    ) -> None:
        """Do no I/O but on the cache's folder.

        Args:
            storage: Reaches `url`.
            url: Of the dataset.
            manifest: What lies there.
            cache: Where blocks are kept on this node's disk; None: nowhere.
            check_etags: Refuse tars with another ETag than when they were indexed, where the store has ETags. A copy
                of the dataset may have others for the same bytes; images are checked against the index in any case.
        """
        self.storage = storage
        self.url = url
        self.manifest = manifest
        self.digest = manifest.digest
        self._ends = np.cumsum(manifest.shards.samples)
        self._starts = self._ends - manifest.shards.samples
        self._indexes = IndexReader(storage, url, manifest.shards)
        self._check_etags = check_etags
        self._cache_place = cache
        self.counters = ReadCounters()
        self.activities = ThreadActivities()
        self.cache = BlockCache(cache, self.digest) if cache else None

    @classmethod
    def open(cls, storage: Storage, url: str, *, cache: CachePlace | None = None, check_etags: bool = True) -> Dataset:
        """Read the manifest; indexes follow when they are needed. The arguments are those of the constructor.

        Raises:
            DatasetError: No manifest there, or an unreadable one.
            StorageError: The URL cannot be reached.
        """
        url = normal(url)
        return cls(storage, url, Manifest.load(storage, url), cache=cache, check_etags=check_etags)

    def opener(self) -> Callable[[Storage], Dataset]:
        """What opens the same dataset through a storage, in another process; picklable, and shares nothing."""
        return functools.partial(
            Dataset, url=self.url, manifest=self.manifest, cache=self._cache_place, check_etags=self._check_etags
        )

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

    def pixel_kind(self, channels: int) -> PixelKind:
        """What samples are decoded to for a model.

        Args:
            channels: That it takes: of photographs 1 or 3, else as many as images have bands.

        Raises:
            DatasetError: The images do not have them.
        """
        kind = self.manifest.kind
        wanted = replace(kind, channels=channels)
        if wanted != kind and not (kind.is_photographic and wanted.is_photographic):
            rule = f"must have images of {channels} channels, as the model takes them"
            raise DatasetError("dataset", rule, f"{kind.channels} in {self.url}", "take other data or another model")
        return wanted

    def read(self, sample_ids: Sequence[int] | Int64s) -> list[Sample]:
        """Read samples by ranged requests; neighbours in a shard share one.

        Args:
            sample_ids: Distinct or not, in any order.

        Returns:
            One sample for each id, in the order of the ids.

        Raises:
            DatasetError: A byte differs from what was ingested; names shard, key and offset.
        """
        samples = []
        for found in self.read_each(sample_ids):
            if isinstance(found, BadSample):
                raise found.error()
            samples.append(found)
        return samples

    def read_each(
        self, sample_ids: Sequence[int] | Int64s, block: range | None = None, *, whole_block: bool = True
    ) -> list[Sample | BadSample]:
        """Read samples, and report each that is not as it was ingested.

        A sample that comes damaged is read once more by itself before it counts as bad.

        Args:
            sample_ids: Distinct or not, in any order.
            block: Ids of neighbours, these samples among them, that the disk cache keeps as one; None: leave it alone.
            whole_block: Whether to fetch and keep the whole block where the cache does not have it.

        Returns:
            A sample, or what is wrong with it, for each id, in the order of the ids.
        """
        ids = np.asarray(sample_ids, np.int64)
        unique = np.unique(ids)
        with self.activities.doing("read", f"the index of sample {unique[0]}"):
            rows, found = self._rows_each(unique)
        by_shard = itertools.groupby(rows, key=lambda sample: sample.shard)
        for shard, wanted in by_shard:
            reader = self._reader(shard)
            if self.cache and block is not None and (runs := self._block_runs(shard, block)):
                found |= reader.read_cached(runs, list(wanted), self.cache, whole_block=whole_block)
            else:
                found |= reader.read(list(wanted))
        return [found[sample] for sample in ids.tolist()]

    def keep(self, block: range) -> None:
        """Fetch a block into the disk cache, unless it is there or there is no room."""
        if self.cache:
            for shard, _ in self._by_shard(np.arange(block.start, block.stop)):
                self._reader(shard).keep(self._block_runs(shard, block), self.cache)

    def _reader(self, shard: int) -> ShardReader:
        entry = self.manifest.shards[shard]
        etag = entry.etag if self._check_etags else None
        url = entry.tar_url(self.url)
        return ShardReader(
            self.storage,
            shard,
            entry.name,
            url=url,
            etag=etag,
            counters=self.counters,
            activities=self.activities,
        )

    def _rows_each(self, ids: Int64s) -> tuple[list[SampleRow], dict[int, Sample | BadSample]]:
        """Rows of ascending ids, and the samples whose index cannot be read."""
        try:
            return self.rows(ids), {}
        except DatasetError:
            pass
        rows: list[SampleRow] = []
        bad: dict[int, Sample | BadSample] = {}
        for sample in ids.tolist():
            try:
                rows += self.rows([sample])
            except DatasetError as error:
                ((shard, _),) = self._by_shard(np.array([sample]))
                name, url = self.manifest.shards[shard].name, self.manifest.shards[shard].index_url(self.url)
                bad[sample] = BadSample(sample, name, "", -1, 0, url, "index", f"{error.rule}: {error.remedy}")
        return rows, bad

    def _block_runs(self, shard: int, block: range) -> list[list[SampleRow]]:
        """The part of a block that lies in a shard, as it is fetched; empty where its index cannot be read whole."""
        first, stop = int(self._starts[shard]), int(self._ends[shard])
        try:
            return neighbours(self.rows(np.arange(max(first, block.start), min(stop, block.stop))))
        except DatasetError:
            return []

    def rows(self, sample_ids: Sequence[int] | Int64s) -> list[SampleRow]:
        """Rows of some samples: key, place in the tar, CRC32C, size, label. No image byte is read.

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
        """The whole index of the shard with that place in the manifest; read again each time.

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


def _altered(what: str, url: str, why: str) -> DatasetError:
    return DatasetError(what, "must be as it was ingested", url, f"{why}; restore it, or shard the dataset again")
