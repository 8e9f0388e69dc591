"""What one task of a consolidation does: make one part of a file, or read a finished file through.

Imports neither torch nor DeepSpeed: a task's memory is that of the interpreter, the storage client, and a few parts.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from jobs.errors import CheckpointError
from jobs.torch_archive import Record, damaged
from jobs.weight_files import DTYPES, Part, Slice
from pipeline import parted_write
from pipeline.parted_write import PartedWrite, WrittenPart
from pipeline.storage import Storage

_GAP_BYTES = 4096
"""Ranges of one record that are no further apart are read at once."""
_READS = 4
"""Ranges that a task reads at once."""
_STREAM_BYTES = 4 << 20
_CONVERT_BYTES = 1 << 20
"""Converted at once: rounding holds several copies of what it works on."""


@dataclass(frozen=True)
class MakePart:
    """Make one part and put it into the object that it belongs to."""

    part: Part
    target: PartedWrite


@dataclass(frozen=True)
class MakeFile:
    """Make a whole file, part after part, where the store takes no parts from several writers."""

    url: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class CheckRange:
    """Read bytes of a record that no part holds, for its checksum."""

    read: ReadRange


@dataclass(frozen=True)
class HashFile:
    """Read a finished file through."""

    url: str
    bytes: int


@dataclass(frozen=True)
class ReadRange:
    """Bytes of a record that one request reads."""

    record: Record
    start: int
    bytes: int


@dataclass(frozen=True)
class Checked:
    """What was read of a record, and its CRC-32."""

    record: Record
    start: int
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Done:
    """What came of a task."""

    url: str
    bytes: int = 0
    """That were added to the file."""
    parts: tuple[tuple[int, int, int], ...] = ()
    """Number, bytes and CRC32C of each part that was made."""
    written: WrittenPart | None = None
    checked: tuple[Checked, ...] = ()
    sha256: str = ""
    crc32c: int = 0
    """Of the whole file; with `sha256`."""


Task = MakePart | MakeFile | CheckRange | HashFile


def work(storage: Storage, url: str, task: Task) -> Done:  # noqa: ARG001 (a fan-out hands it to every task)
    """Do one task.

    Raises:
        CheckpointError: A value does not fit the type that was asked for; names the tensor.
        DamagedCheckpointError: A file ends before it should.
    """
    match task:
        case MakePart(part, target):
            data, checked = made(storage, part)
            written = parted_write.write_part(storage, target, part.number, part.offset, data)
            return Done(part.url, part.bytes, (_told(part, data),), written, checked)
        case MakeFile(file_url, parts):
            return _streamed(storage, file_url, parts)
        case CheckRange(read):
            data = _read(storage, read)
            return Done(read.record.url, checked=(_checked(read, data),))
        case HashFile(file_url, size):
            return _hashed(storage, file_url, size)


def made(storage: Storage, part: Part) -> tuple[bytes, tuple[Checked, ...]]:
    """The bytes of a part, and the checksums of what was read for them."""
    extents = [extent for piece in part.slices for extent in piece.extents]
    reads = joined([ReadRange(extent.record, extent.start, extent.bytes) for extent in extents])
    if len(reads) == 1:
        bodies = [_read(storage, reads[0])]
    else:
        with ThreadPoolExecutor(_READS) as threads:
            bodies = list(threads.map(lambda read: _read(storage, read), reads))
    checked = tuple(_checked(read, body) for read, body in zip(reads, bodies, strict=True))
    found = _Bodies(reads, bodies)
    pieces = [part.literal, *(_converted(piece, found) for piece in part.slices)]
    data = b"".join(pieces)
    assert len(data) == part.bytes
    return data, checked


def joined(reads: Sequence[ReadRange]) -> list[ReadRange]:
    """The same bytes in fewer requests: what touches or all but touches in a record is one range."""
    ordered = sorted(set(reads), key=lambda read: (read.record.url, read.record.offset, read.start))
    ranges: list[ReadRange] = []
    for read in ordered:
        last = ranges[-1] if ranges else None
        if last and last.record == read.record and read.start <= last.start + last.bytes + _GAP_BYTES:
            end = max(last.start + last.bytes, read.start + read.bytes)
            ranges[-1] = ReadRange(last.record, last.start, end - last.start)
        else:
            ranges.append(read)
    return ranges


class _Bodies:
    """What was read, by record and place."""

    def __init__(self, reads: Sequence[ReadRange], bodies: Sequence[bytes]) -> None:
        self._found: dict[Record, list[tuple[int, bytes]]] = {}
        for read, body in zip(reads, bodies, strict=True):
            self._found.setdefault(read.record, []).append((read.start, body))

    def get(self, record: Record, start: int, size: int) -> memoryview:
        for begin, body in self._found[record]:
            if begin <= start and start + size <= begin + len(body):
                return memoryview(body)[start - begin : start - begin + size]
        raise AssertionError("every extent was read")


def _read(storage: Storage, read: ReadRange) -> bytes:
    url = read.record.url
    try:
        data = storage.read_range(url, read.record.offset + read.start, read.bytes)
    except FileNotFoundError:
        raise damaged(url, "it is missing") from None
    if len(data) != read.bytes:
        raise damaged(url, f"it ends within {read.record.name}")
    return data


def _checked(read: ReadRange, data: bytes) -> Checked:
    return Checked(read.record, read.start, read.bytes, zlib.crc32(data))


def _told(part: Part, data: bytes) -> tuple[int, int, int]:
    return part.number, len(data), google_crc32c.value(data)


def _converted(piece: Slice, found: _Bodies) -> bytes | memoryview:
    bodies = [found.get(extent.record, extent.start, extent.bytes) for extent in piece.extents]
    if piece.source_dtype == piece.dtype:
        return bodies[0] if len(bodies) == 1 else b"".join(bodies)
    chunks = (body[at : at + _CONVERT_BYTES] for body in bodies for at in range(0, len(body), _CONVERT_BYTES))
    return b"".join(converted(piece.tensor, chunk, piece.source_dtype, piece.dtype) for chunk in chunks)


def converted(tensor: str, data: bytes | memoryview, source: str, dtype: str) -> bytes:
    """Values of one floating-point type as values of another, each rounded to the nearest, ties to even.

    Args:
        tensor: Its name, for the message.
        data: Little-endian values of type `source`.
        source: `F64`, `F32`, `BF16` or `F16`.
        dtype: `F32`, `BF16` or `F16`.

    Raises:
        CheckpointError: A finite value is beyond what `dtype` can hold.
    """
    values = _as_float32(data, source)
    result: NDArray[Any] = values
    rounded: NDArray[Any] = values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            rounded = result = values.astype(np.float16)
    elif dtype == "BF16":
        result = _bfloat16(values)
        rounded = (result.astype(np.uint32) << 16).view(np.float32)
    fits = np.isfinite(rounded)
    if not fits.all():
        _refuse_overflow(tensor, data, source, dtype, fits)
    return result.tobytes()


def _as_float32(data: bytes | memoryview, source: str) -> NDArray[np.float32]:
    match source:
        case "F32":
            return np.frombuffer(data, np.float32)
        case "BF16":
            return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        case _:
            with np.errstate(over="ignore"):
                return np.frombuffer(data, np.float16 if source == "F16" else np.float64).astype(np.float32)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _refuse_overflow(tensor: str, data: bytes | memoryview, source: str, dtype: str, fits: NDArray[np.bool_]) -> None:
    values = np.frombuffer(data, np.float64) if source == "F64" else _as_float32(data, source)
    lost = values[np.isfinite(values) & ~fits]
    if lost.size:
        name = next(name for name, stored in DTYPES.items() if stored == dtype)
        rule, value = f"must hold every value of {tensor}", f"{name}, and one is {lost[0]:g}"
        raise CheckpointError("--dtype", rule, value, "take bf16 or fp32" if name == "fp16" else "take another")


def _streamed(storage: Storage, url: str, parts: Sequence[Part]) -> Done:
    told: list[tuple[int, int, int]] = []
    checked: list[Checked] = []

    def pieces() -> Iterator[bytes]:
        told.clear()
        checked.clear()
        for part in parts:
            data, found = made(storage, part)
            told.append(_told(part, data))
            checked.extend(found)
            yield data

    parted_write.write_stream(storage, url, pieces)
    return Done(url, sum(part.bytes for part in parts), tuple(told), checked=tuple(checked))


def _hashed(storage: Storage, url: str, size: int) -> Done:
    """SHA-256 and CRC32C of a file as the store gives it back; one range is read while another is hashed."""
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
