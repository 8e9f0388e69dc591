"""Checked reads of a checkpoint's files: bytes that are not as they were written are never returned.

A read fetches whole chunks from the store and compares each with its CRC32C in the commit. So a rank reads what it
uses and nothing else, and it is known for each chunk whether it was compared: the rest can be dealt to other ranks.

Imports no torch. Memory is bounded: THREADS reads of READ_BYTES, twice while a read is assembled, and some chunks that
hold directories.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from jobs.checkpoint import checkpoint
from jobs.checkpoint.checkpoint import checksummed
from jobs.checkpoint.commit import CHUNK_BYTES, CheckpointFile, Commit
from jobs.checkpoint.tensor_ranges import ByteRange, damaged
from jobs.errors import DamagedCheckpointError
from jobs.run.directory import RunDirectory

READ_BYTES = 8 << 20
"""Of one request, at most."""
THREADS = 8
"""Requests at once."""
_KEPT_CHUNKS = 64
"""Chunks with directories and headers, which are read piece by piece."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Copy:
    """Bytes of a file, and where they are copied to."""

    url: str
    offset: int
    target: memoryview
    """Its length is that of what is read."""

    @property
    def source(self) -> ByteRange:
        """What is read."""
        return ByteRange(self.url, self.offset, len(self.target))


class RangeReader(Protocol):
    """Where a checkpoint's files are read: `Storage`, or the memory of nodes."""

    def read_range(self, url: str, offset: int, length: int) -> bytes:
        """Bytes of a file, fewer where it ends before; FileNotFoundError where there is none."""

    def size(self, url: str) -> int:
        """Bytes of the whole file."""


@dataclass(frozen=True)
class CheckedRange:
    """A byte range of whole chunks, and their checksums: a picklable value, which any process can read."""

    range: ByteRange
    chunk_bytes: int
    """Of each chunk but the file's last."""
    checksums: tuple[int, ...]
    """The CRC32C of each chunk."""
    file_bytes: int
    """Of the whole file."""

    def read(self, storage: RangeReader) -> bytes:
        """The bytes, as they were written.

        Raises:
            DamagedCheckpointError: The file is missing, truncated or altered; names it and the chunk.
        """
        url, offset, length = self.range
        try:
            # One byte more at the file's end, so that a file that is longer is seen without asking for its size.
            data = storage.read_range(url, offset, length + (offset + length == self.file_bytes))
            if len(data) != length:
                raise damaged(url, self._length_fault(storage))
        except FileNotFoundError:
            raise damaged(url, "it is missing") from None
        for number, checksum in enumerate(self.checksums):
            start = number * self.chunk_bytes
            if google_crc32c.value(data[start : start + self.chunk_bytes]) != checksum:
                place = f"at {offset + start} or in the {self.chunk_bytes} bytes from there"
                raise damaged(url, f"it was altered {place}")
        return data

    def _length_fault(self, storage: RangeReader) -> str:
        size = storage.size(self.range.url)
        if size != self.file_bytes:
            return f"it has {size} bytes, not {self.file_bytes}"
        return f"it ends before byte {self.range.offset + self.range.length}"


@dataclass(frozen=True)
class ChunkRequest:
    """Chunks of one file that one request reads."""

    file: int
    first: int
    """Number of the first chunk, counted over all files."""
    count: int


class CheckedFiles:
    """The files of one checkpoint.

    Owns: a bit for each chunk: it was read, and is as it was written.
    Concurrency: `read_range` is safe to call from several threads; the other methods belong to one.
    Failure: every read raises DamagedCheckpointError that names the missing, truncated or altered file, and what
        Storage raises.
    Blocking: every read.
    """

    def __init__(self, run: RunDirectory, commit: Commit, copies: Sequence[RangeReader] = ()) -> None:
        """Number the chunks; does no I/O.

        Args:
            run: Whose checkpoint it is.
            commit: With checksums of chunks: an older one must have passed through `with_chunks`.
            copies: Where the files are, best first; the store if empty.
        """
        self.run, self.commit = run, commit
        self._copies: Sequence[RangeReader] = copies or (run.storage,)
        self._files = [file for file in commit.files if file.bytes]
        assert all(file.chunk_bytes for file in self._files)
        self._urls = [checkpoint.file_url(run, commit.step, file.name) for file in self._files]
        self._numbers = {url: number for number, url in enumerate(self._urls)}
        self._checksums = [np.array(file.chunk_checksums(), np.uint32) for file in self._files]
        self._firsts = [0, *itertools.accumulate(len(checksums) for checksums in self._checksums)]
        self._checked = np.zeros(self._firsts[-1], np.bool_)
        self._chunk = functools.lru_cache(_KEPT_CHUNKS)(lambda file, chunk: self._read(ChunkRequest(file, chunk, 1)))

    @property
    def checked(self) -> NDArray[np.bool_]:
        """For each chunk, in the order of the commit's files: whether it was read here and is as it was written."""
        return self._checked.copy()

    def read_range(self, url: str, offset: int, length: int) -> bytes:
        """A few bytes of one chunk, which is kept for a while: the next read is often of the same one."""
        file = self._numbers[url]
        chunk, start = divmod(offset, self._files[file].chunk_bytes)
        return self._chunk(file, self._firsts[file] + chunk)[start : start + length]

    def chunk_bytes(self, url: str) -> int:
        """Length of the chunks of a file."""
        return self._files[self._numbers[url]].chunk_bytes

    def covering(self, wanted: ByteRange) -> CheckedRange:
        """The whole chunks that hold a byte range, for another process to read; it does not count as checked here."""
        file = self._numbers[wanted.url]
        first, after = self._chunks(wanted)
        return self._range(file, first - self._firsts[file], after - first)

    def holding(self, ranges: Iterable[ByteRange]) -> NDArray[np.intp]:
        """Numbers of the chunks that hold some of the byte ranges, ascending."""
        needed = np.zeros_like(self._checked)
        for wanted in ranges:
            if wanted.length:
                needed[slice(*self._chunks(wanted))] = True
        return np.flatnonzero(needed)

    def urls(self, chunks: NDArray[np.intp]) -> set[str]:
        """The files that chunks lie in."""
        return {self._urls[file] for file in np.unique(np.searchsorted(self._firsts, chunks, "right") - 1).tolist()}

    def clipped(self, copies: Iterable[Copy], first: int, last: int) -> Iterator[Copy]:
        """The parts of copies that lie in chunks [first, last]."""
        for copy in copies:
            file = self._numbers[copy.url]
            begin, size = self._firsts[file], self._files[file].chunk_bytes
            low = max(copy.offset, (first - begin) * size)
            high = min(copy.offset + len(copy.target), (last + 1 - begin) * size)
            if low < high:
                yield Copy(copy.url, low, copy.target[low - copy.offset : high - copy.offset])

    def read_into(self, copies: Iterable[Copy]) -> None:
        """Copy many ranges, in as few requests as the chunks allow."""
        wanted = [copy for copy in copies if len(copy.target)]
        requests = list(self.requests(self.holding(copy.source for copy in wanted)))
        firsts = [request.first for request in requests]
        by_request: list[list[Copy]] = [[] for _ in requests]
        for copy in wanted:
            first, after = self._chunks(copy.source)
            for index in range(bisect.bisect_right(firsts, first) - 1, len(requests)):
                if requests[index].first >= after:
                    break
                by_request[index].append(copy)

        def read(index: int) -> None:
            data, start = memoryview(self._read(requests[index])), self._offset(requests[index])
            for copy in by_request[index]:
                low, high = max(copy.offset, start), min(copy.offset + len(copy.target), start + len(data))
                copy.target[low - copy.offset : high - copy.offset] = data[low - start : high - start]

        in_threads(read, range(len(requests)))

    def check(self, chunks: NDArray[np.intp]) -> None:
        """Read chunks, by number, for their checksums alone."""
        in_threads(self._read, list(self.requests(chunks)))

    def _chunks(self, wanted: ByteRange) -> tuple[int, int]:
        """Numbers of the first chunk of a byte range, and of the one after its last."""
        url, offset, length = wanted
        file = self._numbers[url]
        first, size = self._firsts[file], self._files[file].chunk_bytes
        return first + offset // size, first - (-(offset + length) // size)

    def requests(self, chunks: NDArray[np.intp]) -> Iterator[ChunkRequest]:
        """The requests that read ascending chunks."""
        request: ChunkRequest | None = None
        for chunk in map(int, chunks):
            if request and chunk == request.first + request.count and self._takes_one_more(request):
                request = dataclasses.replace(request, count=request.count + 1)
                continue
            if request:
                yield request
            request = ChunkRequest(bisect.bisect_right(self._firsts, chunk) - 1, chunk, 1)
        if request:
            yield request

    def _takes_one_more(self, request: ChunkRequest) -> bool:
        in_file = request.first + request.count < self._firsts[request.file + 1]
        return in_file and (request.count + 1) * self._files[request.file].chunk_bytes <= READ_BYTES

    def _offset(self, request: ChunkRequest) -> int:
        return (request.first - self._firsts[request.file]) * self._files[request.file].chunk_bytes

    def _read(self, request: ChunkRequest) -> bytes:
        """The bytes of a request, compared with the commit."""
        first = request.first - self._firsts[request.file]
        data = self._whole(self._range(request.file, first, request.count))
        self._checked[request.first : request.first + request.count] = True
        return data

    def _whole(self, wanted: CheckedRange) -> bytes:
        """The bytes from the first copy that has them as they were written."""
        for copy in self._copies[:-1]:
            try:
                return wanted.read(copy)
            except DamagedCheckpointError as error:
                logger.warning("%s; another copy is read", error)
        return wanted.read(self._copies[-1])

    def _range(self, number: int, first: int, count: int) -> CheckedRange:
        """Chunks of one file, counted from its beginning."""
        file, offset = self._files[number], first * self._files[number].chunk_bytes
        wanted = min(count * file.chunk_bytes, file.bytes - offset)
        checksums = self._checksums[number][first : first + count].tolist()
        bytes_there = ByteRange(self._urls[number], offset, wanted)
        return CheckedRange(bytes_there, file.chunk_bytes, tuple(checksums), file.bytes)


def with_chunks(run: RunDirectory, step: int, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
    """The same files with checksums of chunks; files of older commits, which have none, are read whole.

    Raises:
        DamagedCheckpointError: One that was read is missing, or not what its CRC32C says.
    """
    known = {file.name: file for file in files}

    def measure(file: CheckpointFile) -> None:
        url = checkpoint.file_url(run, step, file.name)
        try:
            # First, since a made-up size would otherwise be read to its end, long after that of the file.
            if (size := run.storage.size(url)) != file.bytes:
                raise damaged(url, f"it has {size} bytes, not {file.bytes}")
            found = checksummed(file.name, _chunks_of(run, url, file.bytes), CHUNK_BYTES)
        except FileNotFoundError:
            raise damaged(url, "it is missing") from None
        if (found.bytes, found.crc32c) != (file.bytes, file.crc32c):
            raise damaged(url, "it was altered")
        known[file.name] = found

    in_threads(measure, [file for file in files if not file.chunk_bytes])
    return [known[file.name] for file in files]


def check_sizes(run: RunDirectory, commit: Commit, *, part: int = 0, parts: int = 1, empty: bool = False) -> None:
    """Compare sizes of files with the commit's, in one request each.

    Args:
        run: Whose checkpoint it is.
        commit: Of the checkpoint.
        part: Which part of them, in [0, parts).
        parts: How many parts they are dealt into.
        empty: Only of empty files, if all others are read anyway.

    Raises:
        DamagedCheckpointError: One is missing, or has another size.
    """

    def check(file: CheckpointFile) -> None:
        url = checkpoint.file_url(run, commit.step, file.name)
        try:
            size = run.storage.size(url)
        except FileNotFoundError:
            raise damaged(url, "it is missing") from None
        if size != file.bytes:
            raise damaged(url, f"it has {size} bytes, not {file.bytes}")

    in_threads(check, [file for file in commit.files if not (empty and file.bytes)][part::parts])


def _chunks_of(run: RunDirectory, url: str, size: int) -> Iterator[bytes]:
    for offset in range(0, size, READ_BYTES):
        wanted = min(READ_BYTES, size - offset)
        data = run.storage.read_range(url, offset, wanted)
        if len(data) != wanted:
            raise damaged(url, f"it ends before byte {offset + wanted}")
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def in_threads(work: Callable[[T], Any], items: Sequence[T]) -> None:
    """Do `work` on every item; after the first that raises, no other is started."""
    threads = ThreadPoolExecutor(THREADS)
    try:
        for _ in threads.map(work, items):
            pass
    finally:
        threads.shutdown(cancel_futures=True)
