"""Rows of single samples out of shard indexes: pages by ranged requests, checked, and cached within a budget.

Where all indexes of the dataset fit the budget, the first need of a shard reads its whole index, since a small request
takes as long as a smaller one. Otherwise only the pages that hold the wanted rows are read, so that opening a block
costs some kilobytes whatever the shard's size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import DatasetError
from pipeline.shard.index import IndexRow, row_of
from pipeline.shard.index_pages import PAGE_ROWS, Rows
from pipeline.shard.table import ShardTable
from pipeline.store.storage import Storage

INDEX_CACHE_BYTES = 256 << 20
PAGE_CACHE_BYTES = 32 << 20
"""Enough where indexes do not fit: an epoch needs the pages of a block in the first batch and in its window only."""
NEAR_PAGES = 8
"""Pages that are read unasked, if that saves a request."""

Int64s = npt.NDArray[np.int64]


class SampleRow(NamedTuple):
    """One sample of a dataset and what its index says of it."""

    id: int
    """Its place in the dataset, from 0."""
    shard: int
    """Place of its shard in the manifest."""
    place: int
    """Its place in the shard, from 0."""
    row: IndexRow


class IndexReader:
    """Reads rows of one dataset's indexes.

    Owns: an LRU of pages, bounded in bytes.
    Concurrency: safe to call from several threads; one shard is read by one thread at a time.
    Blocking: rows() does I/O, as long as Storage retries.
    """

    def __init__(self, storage: Storage, url: str, shards: ShardTable, cache_bytes: int = INDEX_CACHE_BYTES) -> None:
        self._storage = storage
        self._url = url
        self._shards = shards
        self._whole = shards.index_bytes <= cache_bytes
        self._cache = _PageCache(cache_bytes if self._whole else min(cache_bytes, PAGE_CACHE_BYTES))
        self._turns: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def cached_bytes(self) -> int:
        """Bytes of pages held now."""
        return self._cache.bytes

    def holds(self, shard: int, places: Int64s) -> bool:
        """Whether rows() would find these in the cache."""
        return all(self._cache.get((shard, page)) is not None for page in np.unique(places // PAGE_ROWS).tolist())

    def rows(self, shard: int, places: Int64s) -> list[IndexRow]:
        """Rows of some samples of one shard.

        Args:
            shard: Place in the manifest.
            places: (n,) places in the shard, in any order.

        Raises:
            DatasetError: The index is missing, damaged, or not the one that the manifest names, or says of one of these
                samples what is impossible.
        """
        numbers = places // PAGE_ROWS
        with self._turn(shard):
            pages = self._pages(shard, np.unique(numbers))
        rows = [
            row_of(pages[page][place % PAGE_ROWS])
            for page, place in zip(numbers.tolist(), places.tolist(), strict=True)
        ]
        tar_bytes = int(self._shards.tar_bytes[shard])
        for row in rows:
            if not (flaw := row.flaw(tar_bytes)):
                continue
            remedy = f"of {row.member!r} {flaw}; restore it, or index the dataset again"
            raise DatasetError(
                "shard index", "must hold what is possible", self._shards[shard].index_url(self._url), remedy
            )
        return rows

    def _pages(self, shard: int, numbers: Int64s) -> dict[int, Rows]:
        found = {page: held for page in numbers.tolist() if (held := self._cache.get((shard, page))) is not None}
        missing = [page for page in numbers.tolist() if page not in found]
        if not missing:
            return found
        runs = [range(self._shards[shard].pages.count)] if self._whole else _runs(missing)
        for run in runs:
            read = self._read(shard, run)
            for page, held in zip(run, read, strict=True):
                self._cache.put((shard, page), held)
            found.update(zip(run, read, strict=True))
        return found

    def _read(self, shard: int, run: range) -> list[Rows]:
        entry = self._shards[shard]
        url, pages = entry.index_url(self._url), entry.pages
        try:
            data = self._storage.read_range(url, *pages.range(run.start, run.stop))
        except FileNotFoundError:
            remedy = "it is missing; restore it, or index the dataset again"
            raise DatasetError("shard index", "must be the one that the manifest names", url, remedy) from None
        return pages.decode(data, run.start, run.stop, url)

    def _turn(self, shard: int) -> threading.Lock:
        # Shards share locks: one each would be 200,000.
        with self._lock:
            return self._turns.setdefault(shard % 1024, threading.Lock())


class _PageCache:
    """LRU of pages, bounded in bytes; keeps the newest even if it alone is too large."""

    def __init__(self, limit_bytes: int) -> None:
        self.bytes = 0
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, page: tuple[int, int]) -> Rows | None:
        with self._lock:
            if page in self._held:
                self._held.move_to_end(page)
            return self._held.get(page)

    def put(self, page: tuple[int, int], rows: Rows) -> None:
        with self._lock:
            before = self._held.pop(page, None)
            self._held[page] = rows
            self.bytes += rows.nbytes - (0 if before is None else before.nbytes)
            while len(self._held) > 1 and self.bytes > self._limit_bytes:
                self.bytes -= self._held.popitem(last=False)[1].nbytes


def _runs(pages: list[int]) -> list[range]:
    """Ranges that cover ascending pages; near ones share a range."""
    runs: list[range] = []
    for page in pages:
        if runs and page - runs[-1].stop <= NEAR_PAGES:
            runs[-1] = range(runs[-1].start, page + 1)
        else:
            runs.append(range(page, page + 1))
    return runs
