"""What is read of a checkpoint for one part of a weight file, in whole chunks that carry their checksums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.checkpoint.checked_files import READ_BYTES, CheckedFiles, CheckedRange
from jobs.checkpoint.torch_archive import ITEM_BYTES
from jobs.weights.file_layout import Part


@dataclass(frozen=True)
class Take:
    """Values of one tensor within what a read gives, and where they go in the part."""

    start: int
    """Of the first byte, within the read."""
    bytes: int
    offset: int
    """Within the part, where they are `dtype`."""
    tensor: str
    source_dtype: str
    dtype: str


@dataclass(frozen=True)
class PartRead:
    """One request for a part, and what is taken of its answer."""

    range: CheckedRange
    takes: tuple[Take, ...]


@dataclass(frozen=True)
class PartPlan:
    """A part of one file, with all that it takes to make it: a picklable value."""

    url: str
    number: int
    """From 1 on."""
    offset: int
    literal: bytes
    bytes: int
    reads: tuple[PartRead, ...]


@dataclass(frozen=True)
class _Place:
    """Values of one tensor in a file of the checkpoint."""

    url: str
    start: int
    bytes: int
    offset: int
    tensor: str
    source_dtype: str
    dtype: str

    @property
    def end(self) -> int:
        return self.start + self.bytes


def planned(part: Part, files: CheckedFiles) -> PartPlan:
    """Plan a part: in as few requests as there are places that lie apart, each of about READ_BYTES at most."""
    reads: list[PartRead] = []
    group: list[_Place] = []
    for place in sorted(_places(part), key=lambda place: (place.url, place.start)):
        if group and not _joins(group, place, files.chunk_bytes(place.url)):
            reads.append(_read(group, files))
            group = []
        group.append(place)
    if group:
        reads.append(_read(group, files))
    return PartPlan(part.url, part.number, part.offset, part.literal, part.bytes, tuple(reads))


def _places(part: Part) -> Iterator[_Place]:
    """Where the part's values lie, in pieces of READ_BYTES at most."""
    offset = len(part.literal)
    for piece in part.slices:
        item, item_there = ITEM_BYTES[piece.source_dtype], ITEM_BYTES[piece.dtype]
        for extent in piece.extents:
            for begin in range(0, extent.bytes, READ_BYTES):
                size = min(READ_BYTES, extent.bytes - begin)
                start = extent.record.offset + extent.start + begin
                yield _Place(extent.record.url, start, size, offset, piece.tensor, piece.source_dtype, piece.dtype)
                offset += size // item * item_there
    assert offset == part.bytes


def _joins(group: Sequence[_Place], place: _Place, chunk_bytes: int) -> bool:
    """Whether one request may give a place too: its chunks touch those of the group, which does not become too long."""
    if place.url != group[0].url or place.end - group[0].start > READ_BYTES:
        return False
    return place.start // chunk_bytes <= -(-group[-1].end // chunk_bytes)


def _read(group: Sequence[_Place], files: CheckedFiles) -> PartRead:
    start, end = group[0].start, max(place.end for place in group)
    found = files.covering(group[0].url, start, end - start)
    takes = (
        Take(place.start - found.offset, place.bytes, place.offset, place.tensor, place.source_dtype, place.dtype)
        for place in group
    )
    return PartRead(found, tuple(takes))
