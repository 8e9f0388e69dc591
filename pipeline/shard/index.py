"""The index of a shard: where each image lies in the tar, and its checksum.

The same shard gives the same bytes. Readers of samples take pages of it (`index_reader`); here it is whole.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from pipeline.errors import DatasetError
from pipeline.shard.index_pages import HEAD, INDEX_VERSION, Pages, Rows, row_type
from pipeline.store.json_text import parsed_object

NO_LABEL = -1
LARGEST_IMAGE_BYTES = 256 << 20
"""Of an image as a file; larger ones are skipped."""

_TRAILER = struct.Struct("<II")
_TAR_HEADER_BYTES = 512
_FOOTER_TYPES = {
    "shard": str,
    "tar_bytes": int,
    "sources_digest": str,
    "skipped": list,
    "samples": int,
    "key_bytes": int,
    "extension_bytes": int,
    "digest": str,
}


class IndexRow(NamedTuple):
    """One sample."""

    key: str
    """As WebDataset defines it: the image member's path up to the first dot of its last part."""
    offset: int
    """Byte in the tar at which the image begins."""
    length: int
    """Bytes of the image."""
    crc: int
    """CRC32C of the image's bytes."""
    height: int
    width: int
    label: int
    """NO_LABEL where there is none."""
    extension: str = "jpg"
    """What follows the key and a dot in the image member's name: jpg, png, seg.webp, ..."""

    @property
    def member(self) -> str:
        """Name of the image in the tar."""
        return f"{self.key}.{self.extension}"

    def flaw(self, tar_bytes: int) -> str:
        """Why the row cannot be true of a tar of that size; empty where it can.

        Readers check before they read: a page's CRC32C says that a row is as it was written, not that it was honest.
        """
        if self.offset < _TAR_HEADER_BYTES or not 0 < self.length <= tar_bytes - self.offset:
            return f"its place, {self.length} bytes from byte {self.offset}, is not in the tar of {tar_bytes} bytes"
        if self.length > LARGEST_IMAGE_BYTES:
            return f"its {self.length} bytes are more than {LARGEST_IMAGE_BYTES}"
        if self.height < 1 or self.width < 1:
            return f"its size is {self.width} x {self.height} pixels"
        return f"its label is {self.label}" if self.label < NO_LABEL else ""


@dataclass(frozen=True)
class Skipped:
    """An image that was skipped, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A shard's samples in the tar's order."""

    shard: str
    tar_bytes: int
    sources_digest: str
    skipped: tuple[Skipped, ...]
    table: Rows
    """(n,) of `index_pages.row_type`."""
    tar_etag: str | None = None
    """Of the tar, as its store gave it; not part of the digest, so that a copy in another store is the same index."""

    @classmethod
    def from_rows(
        cls,
        shard: str,
        tar_bytes: int,
        sources_digest: str,
        skipped: tuple[Skipped, ...],
        rows: list[IndexRow],
        *,
        tar_etag: str | None = None,
    ) -> ShardIndex:
        """Put together rows, in the tar's order."""
        keys = [_encoded(row.key) for row in rows]
        extensions = [_encoded(row.extension) for row in rows]
        dtype = row_type(max(map(len, keys), default=0), max(map(len, extensions), default=0))
        table = np.empty(len(rows), dtype)
        table["key"], table["extension"] = keys, extensions
        for name in ("offset", "length", "crc", "height", "width", "label"):
            table[name] = [getattr(row, name) for row in rows]
        return cls(shard, tar_bytes, sources_digest, skipped, table, tar_etag)

    def __len__(self) -> int:
        return len(self.table)

    def row(self, place: int) -> IndexRow:
        """The sample with that place in the shard."""
        return row_of(self.table[place])

    @property
    def digest(self) -> str:
        """SHA-256 of all that it says of the shard's bytes: identifies the shard down to every image."""
        return hashlib.sha256(_canonical(self._content()) + self.table.tobytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The index as a file."""
        pages = Pages(len(self), self.table.dtype, self.digest)
        footer = _canonical({**self._content(), "tar_etag": self.tar_etag, "digest": pages.digest})
        return HEAD + pages.encode(self.table) + footer + _TRAILER.pack(len(footer), google_crc32c.value(footer))

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> ShardIndex:
        """Read an index.

        Args:
            data: The whole file.
            url: Where it came from, for the message.

        Raises:
            DatasetError: It is damaged, no index, or one of another version.
        """
        head = data[: len(HEAD)]
        if head != HEAD and (head[:-2], head[-1:]) == (HEAD[:-2], HEAD[-1:]):
            found = head[-2:-1].decode("ascii", "replace")
            remedy = f"read {url} with the release that wrote it"
            raise DatasetError("shard index", f"must have version {INDEX_VERSION}", found, remedy)
        try:
            index = cls._parsed(data, url)
            whole = index.to_bytes() == data
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError):
            whole = False  # ValueError: also a page that is refused
        except struct.error:
            whole = False
        if not whole:
            raise DatasetError("shard index", "must be whole", url, "restore it, or make the dataset again")
        return index

    @classmethod
    def _parsed(cls, data: bytes, url: str) -> ShardIndex:
        footer_bytes, _ = _TRAILER.unpack(data[-_TRAILER.size :])
        footer = parsed_object(data[-_TRAILER.size - footer_bytes : -_TRAILER.size])
        _check_footer(footer)
        dtype = row_type(footer["key_bytes"], footer["extension_bytes"])
        pages = Pages(footer["samples"], dtype, footer["digest"])
        start, length = pages.range(0, pages.count)
        parts = pages.decode(data[start : start + length], 0, pages.count, url)
        table = np.concatenate(parts) if parts else np.empty(0, dtype)
        skipped = tuple(Skipped(**item) for item in footer["skipped"])
        return cls(footer["shard"], footer["tar_bytes"], footer["sources_digest"], skipped, table, footer["tar_etag"])

    def _content(self) -> dict[str, Any]:
        return {
            "shard": self.shard,
            "tar_bytes": self.tar_bytes,
            "sources_digest": self.sources_digest,
            "skipped": [asdict(item) for item in self.skipped],
            "samples": len(self),
            "key_bytes": self.table.dtype["key"].itemsize,
            "extension_bytes": self.table.dtype["extension"].itemsize,
        }


def _check_footer(footer: Any) -> None:
    """Raise TypeError for a field that is not of its type."""
    if any(type(footer[name]) is not kind for name, kind in _FOOTER_TYPES.items()):
        raise TypeError("a field of the footer is of another type")
    if not isinstance(footer["tar_etag"], str | None):
        raise TypeError("tar_etag is no string")
    for item in footer["skipped"]:
        if not set(map(type, item.values())) <= {str}:
            raise TypeError("skipped is no list of objects of strings")


def row_of(row: np.void) -> IndexRow:
    """One row of a table."""
    values: Any = row.item()
    offset, length, label, crc, height, width, key, extension = values
    return IndexRow(_decoded(key), offset, length, crc, height, width, label, _decoded(extension))


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _encoded(text: str) -> bytes:
    """The bytes of a name: in a tar it need not be UTF-8, and tarfile's surrogates keep them."""
    return text.encode("utf-8", "surrogateescape")


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
