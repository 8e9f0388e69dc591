"""Pages of an index file: rows of one block are found by arithmetic and read by one small request.

    head     16 bytes, names format and version
    page 0   PAGE_ROWS rows of fixed width, then the CRC32C of salt and rows
    page 1   ...                            the last page has the rest
    footer   what an ingest needs to know; only whole reads look at it (`pipeline.shard.index`)

The salt is the digest of the whole index, which the manifest holds, and the page's number. So a page of another shard,
of another version of this shard, or of another place in it is refused like a damaged one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from pipeline.errors import DatasetError

INDEX_VERSION = 2
HEAD = b"convmae index 2\n"
PAGE_ROWS = 64
CRC_BYTES = 4

Rows = npt.NDArray[np.void]
"""(n,) samples of a `row_type`."""


def row_type(key_bytes: int, extension_bytes: int) -> np.dtype[Any]:
    """One row, packed, little-endian; strings are padded with NUL to the longest of the shard."""
    return np.dtype(
        [
            ("offset", "<i8"),
            ("length", "<i8"),
            ("label", "<i8"),
            ("crc", "<u4"),
            ("height", "<i4"),
            ("width", "<i4"),
            ("key", f"S{max(1, key_bytes)}"),
            ("extension", f"S{max(1, extension_bytes)}"),
        ]
    )


@dataclass(frozen=True)
class Pages:
    """The pages of one index."""

    rows: int
    """Of the whole index."""
    row_type: np.dtype[Any]
    digest: str
    """Of the whole index."""

    @property
    def count(self) -> int:
        """How many pages there are."""
        return -(-self.rows // PAGE_ROWS)

    def range(self, first: int, last: int) -> tuple[int, int]:
        """Offset and length in the file of pages [first, last)."""
        row_bytes = self.row_type.itemsize
        held = min(last * PAGE_ROWS, self.rows) - first * PAGE_ROWS
        return len(HEAD) + first * (PAGE_ROWS * row_bytes + CRC_BYTES), held * row_bytes + (last - first) * CRC_BYTES

    def encode(self, rows: Rows) -> bytes:
        """All pages, from all rows."""
        cuts = range(0, self.rows, PAGE_ROWS)
        return b"".join(self.encode_page(page, rows[start : start + PAGE_ROWS]) for page, start in enumerate(cuts))

    def encode_page(self, page: int, rows: Rows) -> bytes:
        """One page, from its rows."""
        held = rows.tobytes()
        return held + self._crc(page, held)

    def decode(self, data: bytes, first: int, last: int, url: str) -> list[Rows]:
        """Check and take apart the bytes of `range(first, last)`: one table a page.

        Args:
            data: Exactly these bytes.
            first: Number of the first page.
            last: One more than that of the last.
            url: Where they came from, for the message.

        Raises:
            DatasetError: They end early, are damaged, or belong to another index or another place.
        """
        pages, start = [], 0
        for page in range(first, last):
            end = start + min(PAGE_ROWS, self.rows - page * PAGE_ROWS) * self.row_type.itemsize
            held, crc = data[start:end], data[end : end + CRC_BYTES]
            if crc != self._crc(page, held):
                remedy = f"page {page} is damaged or another index's; restore it, or index the dataset again"
                raise DatasetError("shard index", "must be the one that the manifest names", url, remedy)
            pages.append(np.frombuffer(held, self.row_type))
            start = end + CRC_BYTES
        return pages

    def _crc(self, page: int, held: bytes) -> bytes:
        salt = bytes.fromhex(self.digest) + struct.pack("<Q", page)
        return struct.pack("<I", google_crc32c.value(salt + held))
