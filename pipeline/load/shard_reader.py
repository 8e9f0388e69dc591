"""A reader of one shard's samples by ranged requests, from the object store or the node's disk; it checks every one."""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c

from pipeline.errors import ReplacedError
from pipeline.load.bad_sample import BadSample, FaultKind
from pipeline.load.block_cache import BlockCache
from pipeline.load.read_counters import ReadCounters
from pipeline.load.thread_activity import ThreadActivities
from pipeline.shard.index import NO_LABEL
from pipeline.shard.index_reader import SampleRow
from pipeline.store.storage import Storage

LONGEST_READ_BYTES = 32 << 20
HEADER_BYTES = 512
"""The tar header that stands before each image; read with it, so that damage to it is found."""


@dataclass(frozen=True)
class Sample:
    """One image as it lies in its shard."""

    id: int
    """Its place in the dataset, from 0."""
    key: str
    shard: str
    member: str
    """Name of the image in the tar."""
    offset: int
    data: bytes
    """A JPEG whose CRC32C has been checked."""
    label: int | None
    url: str
    """Of the tar."""

    def bad(self, fault: FaultKind, reason: str) -> BadSample:
        """This sample, found to be unusable after all."""
        return BadSample(self.id, self.shard, self.member, self.offset, len(self.data), self.url, fault, reason)


class ShardReader:
    """A reader of one shard's samples."""

    def __init__(
        self,
        storage: Storage,
        number: int,
        name: str,
        *,
        url: str,
        etag: str | None,
        counters: ReadCounters,
        activities: ThreadActivities,
    ) -> None:
        """Do no I/O.

        Args:
            storage: Reaches `url`.
            number: The shard's place in the manifest.
            name: The shard's name.
            url: Of its tar.
            etag: That the tar must have; None: any.
            counters: Count what is read.
            activities: Note what is being read.
        """
        self._storage = storage
        self._number = number
        self._name = name
        self._url = url
        self._etag = etag
        self._counters = counters
        self._activities = activities

    def read(self, rows: list[SampleRow]) -> dict[int, Sample | BadSample]:
        """Samples by id, from the object store."""
        found: dict[int, Sample | BadSample] = {}
        for run in neighbours(rows):
            found |= self._fetched(run)[0]
        return found

    def read_cached(
        self, runs: list[list[SampleRow]], wanted: list[SampleRow], cache: BlockCache, *, whole_block: bool
    ) -> dict[int, Sample | BadSample]:
        """Samples by id, from the disk where it has their part of the block."""
        found: dict[int, Sample | BadSample] = {}
        ids = {row.id for row in wanted}
        for run in runs:
            if chosen := [row for row in run if row.id in ids]:
                found |= self._from_disk(run, chosen, cache) or self._missed(run, chosen, cache, whole_block)
        return found

    def _from_disk(
        self, run: list[SampleRow], chosen: list[SampleRow], cache: BlockCache
    ) -> dict[int, Sample | BadSample] | None:
        name, start = self._cached_name(run), _span(run)[0]
        begin, length = _span(chosen)
        data = cache.get(name, begin - start, length)
        if data is None:
            return None
        found = {row.id: self._checked(row, data, begin) for row in chosen}
        if any(isinstance(sample, BadSample) for sample in found.values()):
            cache.drop(name)
            self._counters.add(cache_damaged=1)
            return None
        self._counters.add(cache_hits=1)
        return found

    def _missed(
        self, run: list[SampleRow], chosen: list[SampleRow], cache: BlockCache, whole_block: bool
    ) -> dict[int, Sample | BadSample]:
        self._counters.add(cache_misses=1)
        if not whole_block or cache.full:
            return self.read(chosen)
        found = self._kept(run, cache)
        return {row.id: found[row.id] for row in chosen}

    def keep(self, runs: list[list[SampleRow]], cache: BlockCache) -> None:
        """Fetch a block that the disk does not have."""
        for run in runs:
            if not cache.full and not cache.holds(self._cached_name(run)):
                self._kept(run, cache)

    def _kept(self, run: list[SampleRow], cache: BlockCache) -> dict[int, Sample | BadSample]:
        found, data = self._fetched(run)
        if not any(isinstance(sample, BadSample) for sample in found.values()):
            cache.put(self._cached_name(run), data)
        return found

    def _cached_name(self, run: list[SampleRow]) -> str:
        start, length = _span(run)
        return f"{self._number:06d}-{start}-{length}"

    def _fetched(self, run: list[SampleRow]) -> tuple[dict[int, Sample | BadSample], bytes]:
        """Samples of a run, and the bytes that hold them all."""
        start, length = _span(run)
        try:
            data = self._ranged(start, length, run)
        except (FileNotFoundError, ReplacedError) as error:
            return {row.id: self._gone(row, error) for row in run}, b""
        found = {row.id: self._checked(row, data, start) for row in run}
        for row in run:
            if isinstance(found[row.id], BadSample):
                found[row.id] = self._once_more(row)
        return found, data

    def _once_more(self, row: SampleRow) -> Sample | BadSample:
        """Read a sample again: it may have been damaged on its way here."""
        start, length = _span([row])
        try:
            return self._checked(row, self._ranged(start, length, [row]), start)
        except (FileNotFoundError, ReplacedError) as error:
            return self._gone(row, error)

    def _ranged(self, start: int, length: int, run: list[SampleRow]) -> bytes:
        what = f"{run[0].row.member} to {run[-1].row.member} at offset {start} of {self._url}"
        with self._activities.doing("read", what):
            data = self._storage.read_range(self._url, start, length, self._etag)
        self._counters.add(requests=1, bytes=len(data))
        return data

    def _checked(self, sample: SampleRow, data: bytes, start: int) -> Sample | BadSample:
        """A sample out of `data`, which begins at `start` in the tar."""
        row, begin = sample.row, sample.row.offset - start
        image = data[begin : begin + row.length]
        what = f"the {row.length} bytes of {row.member} at offset {row.offset}"
        if len(image) != row.length:
            return self._bad(sample, "truncated", f"{what} end early")
        if not _is_header(data[begin - HEADER_BYTES : begin]):
            return self._bad(sample, "header", f"the tar header before {what} is damaged")
        if google_crc32c.value(image) != row.crc:
            return self._bad(sample, "checksum", f"{what} do not have the CRC32C of the index")
        label = None if row.label == NO_LABEL else row.label
        return Sample(sample.id, row.key, self._name, row.member, row.offset, image, label, self._url)

    def _gone(self, sample: SampleRow, error: Exception) -> BadSample:
        row = sample.row
        if isinstance(error, FileNotFoundError):
            return self._bad(sample, "missing", f"it is missing, and in it {row.member} at offset {row.offset}")
        why = f"it was replaced: its ETag is no longer {self._etag} (wanted: {row.member} at offset {row.offset})"
        return self._bad(sample, "replaced", why)

    def _bad(self, sample: SampleRow, fault: FaultKind, reason: str) -> BadSample:
        row = sample.row
        return BadSample(sample.id, self._name, row.member, row.offset, row.length, self._url, fault, reason)


def _span(run: list[SampleRow]) -> tuple[int, int]:
    """First byte and length of a run, with the header of its first image."""
    start = run[0].row.offset - HEADER_BYTES
    return start, run[-1].row.offset + run[-1].row.length - start


def _is_header(block: bytes) -> bool:
    """Whether 512 bytes are a tar header with the checksum that it states; some writers sum up signed bytes.

    Source: POSIX.1-2017, pax, "ustar Header Block".
    """
    if len(block) != HEADER_BYTES:
        return False
    try:
        stated = int(block[148:156].rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    return stated == (unsigned := sum(rest)) or stated == unsigned - 256 * sum(octet > 127 for octet in rest)


def neighbours(rows: list[SampleRow]) -> list[list[SampleRow]]:
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
