"""Tasks of a consolidation: make one part of a file, or read a finished file back.

Imports neither torch nor DeepSpeed: a task's memory is that of the interpreter, the storage client, and a few parts.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import google_crc32c

from jobs.consolidation.dtypes import converted
from jobs.consolidation.file_layout import TensorPiece
from jobs.consolidation.reads import PartPlan, PartRead
from pipeline.store import parted_write
from pipeline.store.parted_write import PartedWrite, WrittenPart
from pipeline.store.storage import Storage

_READS = 4
"""Byte ranges that a task reads at once."""
_STREAM_BYTES = 4 << 20
_CONVERT_BYTES = 1 << 20
"""Converted at a time, since rounding holds several copies. A multiple of every type's size."""


@dataclass(frozen=True)
class MakePart:
    """Make one part and upload it into its object."""

    plan: PartPlan
    target: PartedWrite


@dataclass(frozen=True)
class MakeFile:
    """Make a whole file, part by part, for a store that takes no parts from several writers."""

    url: str
    plans: tuple[PartPlan, ...]


@dataclass(frozen=True)
class HashFile:
    """Read a finished file back."""

    url: str
    bytes: int


@dataclass(frozen=True)
class Done:
    """The outcome of a task."""

    url: str
    bytes: int = 0
    """Bytes that were added to the file, or read back."""
    parts: tuple[WrittenPart, ...] = ()
    sha256: str = ""
    crc32c: int = 0
    """Of the whole file, if `sha256` is set."""


Task = MakePart | MakeFile | HashFile


def work(storage: Storage, url: str, task: Task) -> Done:  # noqa: ARG001 (a fan-out passes it to every task)
    """Do one task.

    Raises:
        CheckpointError: A value does not fit the requested type; names the tensor.
        DamagedCheckpointError: A file is missing, truncated or altered; names it and the place.
    """
    match task:
        case MakePart(plan, target):
            data = made(storage, plan)
            written = parted_write.write_part(storage, target, plan.number, plan.offset, data)
            return Done(plan.url, plan.bytes, (written,))
        case MakeFile(file_url, plans):
            return _streamed(storage, file_url, plans)
        case HashFile(file_url, size):
            return _hashed(storage, file_url, size)


def made(storage: Storage, plan: PartPlan) -> bytes:
    """The bytes of a part, from chunks that were compared with the commit."""
    if len(plan.reads) == 1:
        pieces = _pieces(storage, plan.reads[0])
    else:
        with ThreadPoolExecutor(_READS) as threads:
            found = threads.map(lambda read: _pieces(storage, read), plan.reads)
            pieces = [piece for some in found for piece in some]
    pieces.sort(key=lambda piece: piece[0])
    data = b"".join([plan.literal, *(values for _, values in pieces)])
    assert len(data) == plan.bytes
    return data


def _pieces(storage: Storage, read: PartRead) -> list[tuple[int, bytes | memoryview]]:
    """The values that are taken from one read, as they are written, each with its place in the part."""
    data = memoryview(read.source.read(storage))
    is_mostly_taken = 2 * sum(piece.source.length for piece in read.pieces) >= len(data)
    found: list[tuple[int, bytes | memoryview]] = []
    for piece in read.pieces:
        start = piece.source.offset - read.source.range.offset
        values = data[start : start + piece.source.length]
        if piece.source_dtype != piece.dtype:
            found.append((piece.offset, _converted(piece, values)))
        else:  # a copy, if a view would keep much more than needed in memory
            found.append((piece.offset, values if is_mostly_taken else bytes(values)))
    return found


def _converted(piece: TensorPiece, values: memoryview) -> bytes:
    chunks = (values[start : start + _CONVERT_BYTES] for start in range(0, len(values), _CONVERT_BYTES))
    return b"".join(converted(piece.tensor, chunk, piece.source_dtype, piece.dtype) for chunk in chunks)


def _streamed(storage: Storage, url: str, plans: Sequence[PartPlan]) -> Done:
    parts: list[WrittenPart] = []

    def pieces() -> Iterator[bytes]:
        parts.clear()
        for plan in plans:
            data = made(storage, plan)
            parts.append(WrittenPart(plan.number, plan.offset, len(data), google_crc32c.value(data)))
            yield data

    parted_write.write_stream(storage, url, pieces)
    return Done(url, sum(part.bytes for part in parts), tuple(parts))


def _hashed(storage: Storage, url: str, size: int) -> Done:
    """SHA-256 and CRC32C of a file as the store returns it; byte ranges are read while others are hashed."""
    sha256, crc32c, received = hashlib.sha256(), 0, 0
    with ThreadPoolExecutor(_READS) as threads:
        starts = iter(range(0, size, _STREAM_BYTES))

        def ask(start: int) -> Future[bytes]:
            return threads.submit(storage.read_range, url, start, min(_STREAM_BYTES, size - start))

        waiting = [ask(start) for start in itertools.islice(starts, _READS)]
        while waiting:
            data = waiting.pop(0).result()
            waiting += [ask(start) for start in itertools.islice(starts, 1)]
            sha256.update(data)
            crc32c = google_crc32c.extend(crc32c, data)
            received += len(data)
    return Done(url, received, sha256=sha256.hexdigest(), crc32c=crc32c)
