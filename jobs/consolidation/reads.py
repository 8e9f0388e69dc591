"""Reads of a checkpoint for one part of a weight file, in whole chunks with their checksums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.checkpoint.checked_files import READ_BYTES, CheckedFiles, CheckedRange
from jobs.checkpoint.tensor_ranges import ByteRange
from jobs.consolidation.file_layout import TensorPiece, WeightPart


@dataclass(frozen=True)
class PartRead:
    """One request for a part, and the pieces that are taken from its answer."""

    source: CheckedRange
    pieces: tuple[TensorPiece, ...]


@dataclass(frozen=True)
class PartPlan:
    """A part of one file, with all that it takes to make it: a picklable value."""

    url: str
    number: int
    """From 1."""
    offset: int
    literal: bytes
    bytes: int
    reads: tuple[PartRead, ...]


def planned(part: WeightPart, files: CheckedFiles) -> PartPlan:
    """Plan a part: in as few requests as there are places that lie apart, each of about READ_BYTES at most."""
    reads: list[PartRead] = []
    group: list[TensorPiece] = []
    pieces = (cut for piece in part.pieces for cut in piece.cut(READ_BYTES))
    for piece in sorted(pieces, key=lambda piece: piece.source):
        if group and not _joins(group, piece.source, files.chunk_bytes(piece.source.url)):
            reads.append(_read(group, files))
            group = []
        group.append(piece)
    if group:
        reads.append(_read(group, files))
    return PartPlan(part.url, part.number, part.offset, part.literal, part.bytes, tuple(reads))


def _joins(group: Sequence[TensorPiece], source: ByteRange, chunk_bytes: int) -> bool:
    """Whether one request may read a byte range too: its chunks touch those of the group, which stays short enough."""
    first, last = group[0].source, group[-1].source
    if source.url != first.url or source.offset + source.length - first.offset > READ_BYTES:
        return False
    return source.offset // chunk_bytes <= -(-(last.offset + last.length) // chunk_bytes)


def _read(group: Sequence[TensorPiece], files: CheckedFiles) -> PartRead:
    url, start, _ = group[0].source
    end = max(piece.source.offset + piece.source.length for piece in group)
    return PartRead(files.covering(ByteRange(url, start, end - start)), tuple(group))
