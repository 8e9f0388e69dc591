"""Where the values of a named tensor lie in a checkpoint's files. Imports no torch, and reads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.errors import DamagedCheckpointError

ITEM_BYTES = {
    "F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element, by the dtypes of safetensors."""
_FLOATS = ("F64", "F32", "F16", "BF16")


class ByteRange(NamedTuple):
    """Bytes that lie together in one file or object."""

    url: str
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class SourceTensor:
    """A named tensor of the model, and where its elements lie, in one or many files."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As in safetensors, as it is stored."""
    urls: Sequence[str]
    """Of the checkpoint's files, which the extents number."""
    extents: NDArray[np.int64]
    """(n, 3): first element, file, and byte offset of each range of elements that lie together; ascending, no gap."""

    @property
    def is_floating_point(self) -> bool:
        """Whether it is converted to the requested dtype."""
        return self.dtype in _FLOATS

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """Where its elements [start, stop) lie, in order."""
        return (found for _, _, found in self.pieces(start, stop))

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, ByteRange]]:
        """Where its elements [start, stop) lie: first element, the one after the last, and their bytes, in order."""
        item, firsts = ITEM_BYTES[self.dtype], self.extents[:, 0]
        index = int(np.searchsorted(firsts, start, "right")) - 1
        while start < stop:
            first, file, offset = map(int, self.extents[index])
            after = int(firsts[index + 1]) if index + 1 < len(firsts) else self.elements
            end = min(stop, after)
            yield start, end, ByteRange(self.urls[file], offset + (start - first) * item, (end - start) * item)
            start, index = end, index + 1


def damaged(url: str, what: str) -> DamagedCheckpointError:
    """The error for a file of a checkpoint that is not as it was written."""
    remedy = "`convmae checkpoints RUN --verify` shows which others are whole"
    return DamagedCheckpointError("checkpoint", f"must be as it was written ({what})", url, remedy)
