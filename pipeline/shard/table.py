"""The shards of a dataset as columns: 200,000 of them load in a second and take some ten megabytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from pipeline.errors import clipped
from pipeline.shard.index import ShardIndex, Skipped
from pipeline.shard.index_pages import Pages, row_type
from pipeline.store.storage import Storage

INDEX_SUFFIX = ".index"
MOST_KEY_BYTES = 1 << 16
"""Of a key or extension; longer ones are a damaged or hostile manifest, and rows of them would fill the memory."""
MOST_NAME_BYTES = 1 << 10
"""Of a shard's name and of an ETag: the column is as wide as its longest entry."""
MOST_TAR_BYTES = 1 << 12
"""Of a tar's path or URL; Linux has no longer paths."""
MOST_COUNT = 1 << 60
"""Of samples or bytes over all shards: sums stay exact."""
CONTENT_COLUMNS = ("extension_bytes", "index_sha256", "key_bytes", "name", "samples", "tar_bytes")
"""The columns that describe what the shards hold, wherever they lie."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    name: str
    """Unique in the dataset; may have slashes. The index is `<name>.index` beside the manifest."""
    samples: int
    tar_bytes: int
    index_sha256: str
    """`ShardIndex.digest`."""
    key_bytes: int = 8
    """Of the longest key in the index; with extension_bytes it says where a row lies."""
    extension_bytes: int = 3
    etag: str | None = None
    """Of the tar, as its store gave it when it was indexed; None where the store has none."""
    tar: str = ""
    """Where the tar lies: a path relative to the dataset, or a URL; empty: `<name>.tar`."""

    @classmethod
    def of(cls, index: ShardIndex, tar: str = "") -> ShardEntry:
        """The entry of an indexed shard."""
        fields = index.table.dtype
        return cls(
            index.shard,
            len(index),
            index.tar_bytes,
            index.digest,
            fields["key"].itemsize,
            fields["extension"].itemsize,
            index.tar_etag,
            tar,
        )

    @property
    def pages(self) -> Pages:
        """The pages of the index in its file."""
        return Pages(self.samples, row_type(self.key_bytes, self.extension_bytes), self.index_sha256)

    def tar_url(self, url: str) -> str:
        """URL of the shard's tar, in the dataset at `url`."""
        place = self.tar or f"{self.name}.tar"
        return place if "://" in place or place.startswith("/") else Storage.join(url, place)

    def index_url(self, url: str) -> str:
        """URL of the shard's index, in the dataset at `url`."""
        return Storage.join(url, f"{self.name}{INDEX_SUFFIX}")


@dataclass(frozen=True)
class ShardReport:
    """The result of the task that makes a shard or its index."""

    entry: ShardEntry
    skipped: tuple[Skipped, ...]
    kept: bool
    """Whether an earlier ingest had already finished it."""

    @property
    def name(self) -> str:
        """Of the shard."""
        return self.entry.name

    @property
    def samples(self) -> int:
        """In the shard."""
        return self.entry.samples

    @property
    def tar_bytes(self) -> int:
        """Of the shard."""
        return self.entry.tar_bytes


class ShardTable(Sequence[ShardEntry]):
    """Columns, one entry a shard; an item is a `ShardEntry`. Immutable."""

    def __init__(
        self,
        *,
        names: Sequence[str],
        samples: Sequence[int],
        tar_bytes: Sequence[int],
        index_sha256: Sequence[str],
        key_bytes: Sequence[int],
        extension_bytes: Sequence[int],
        etags: Sequence[str | None],
        tars: Sequence[str],
    ) -> None:
        self._names = _strings("name", names, MOST_NAME_BYTES)
        if len(set(names)) != len(names):
            raise ValueError("a shard's name is there twice")
        if any(leads_away(name) for name in names):
            raise ValueError("a shard's name leads out of the dataset")
        if any(len(digest) != 64 for digest in index_sha256):
            raise ValueError("a digest of an index is no SHA-256")
        self.samples: npt.NDArray[np.int64] = _counts("samples", samples)
        self.tar_bytes: npt.NDArray[np.int64] = _counts("tar_bytes", tar_bytes)
        self.key_bytes: npt.NDArray[np.int64] = _counts("key_bytes", key_bytes)
        self.extension_bytes: npt.NDArray[np.int64] = _counts("extension_bytes", extension_bytes)
        if (self.key_bytes > MOST_KEY_BYTES).any() or (self.extension_bytes > MOST_KEY_BYTES).any():
            raise ValueError(f"keys or extensions of more than {MOST_KEY_BYTES} bytes")
        self._index_sha256 = np.frombuffer(bytes.fromhex("".join(index_sha256)), np.uint8).reshape(-1, 32)
        self._etags = _strings("etag", ["" if etag is None else etag for etag in etags], MOST_NAME_BYTES)
        self._tars = _strings("tar", tars, MOST_TAR_BYTES)
        columns = (self._names, self.samples, self.tar_bytes, self.key_bytes, self.extension_bytes, self._index_sha256)
        if len({len(column) for column in (*columns, self._etags, self._tars)}) != 1:
            raise ValueError("columns of shards differ in length")

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> ShardTable:
        """Put together entries, in order."""
        rows = list(entries)
        return cls(
            names=[row.name for row in rows],
            samples=[row.samples for row in rows],
            tar_bytes=[row.tar_bytes for row in rows],
            index_sha256=[row.index_sha256 for row in rows],
            key_bytes=[row.key_bytes for row in rows],
            extension_bytes=[row.extension_bytes for row in rows],
            etags=[row.etag for row in rows],
            tars=[row.tar for row in rows],
        )

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, place: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, place: slice) -> list[ShardEntry]: ...
    def __getitem__(self, place: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return ShardEntry(
            self._names[place].decode(),
            int(self.samples[place]),
            int(self.tar_bytes[place]),
            self._index_sha256[place].tobytes().hex(),
            int(self.key_bytes[place]),
            int(self.extension_bytes[place]),
            self._etags[place].decode() or None,
            self._tars[place].decode(),
        )

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[place] for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self._index_sha256.tobytes())

    @property
    def index_bytes(self) -> int:
        """Approximate bytes of all indexes together."""
        widths = row_type(1, 1).itemsize - 2 + self.key_bytes + self.extension_bytes
        return int((self.samples * widths).sum())

    def column(self, name: str) -> list[Any]:
        """One column as plain values, by the name that it has in the manifest."""
        if name == "index_sha256":
            digests = self._index_sha256.tobytes().hex()
            return [digests[start : start + 64] for start in range(0, len(digests), 64)]
        if name == "etag":
            return [etag.decode() or None for etag in self._etags.tolist()]
        if name in ("name", "tar"):
            return [value.decode() for value in (self._names if name == "name" else self._tars).tolist()]
        values: list[int] = getattr(self, name).tolist()
        return values

    def to_json(self) -> dict[str, list[Any]]:
        """All columns; `tar` and `etag` only where a shard has one."""
        placed = [name for name, held in (("etag", self._etags), ("tar", self._tars)) if any(held.tolist())]
        return {name: self.column(name) for name in (*CONTENT_COLUMNS, *placed)}

    @classmethod
    def from_json(cls, columns: dict[str, list[Any]]) -> ShardTable:
        """Read what to_json wrote.

        Raises:
            KeyError, ValueError, TypeError, AttributeError: A column is missing, or cannot be one.
        """
        count = len(columns["name"])
        return cls(
            names=columns["name"],
            samples=columns["samples"],
            tar_bytes=columns["tar_bytes"],
            index_sha256=columns["index_sha256"],
            key_bytes=columns["key_bytes"],
            extension_bytes=columns["extension_bytes"],
            etags=columns.get("etag", [None] * count),
            tars=columns.get("tar", [""] * count),
        )


def _strings(field: str, values: Sequence[str], most_bytes: int) -> npt.NDArray[np.bytes_]:
    if not set(map(type, values)) <= {str}:
        raise ValueError(f"shards.{field} must be a list of strings")
    encoded = [value.encode() for value in values]
    for place, value in enumerate(encoded):
        if len(value) > most_bytes or b"\0" in value:
            shown = f"shards.{field} of shard {place}, {clipped(values[place])!r}"
            raise ValueError(f"{shown}: must have at most {most_bytes} bytes and no NUL, has {len(value)} bytes")
    return np.array(encoded, np.bytes_)


def _counts(field: str, values: Sequence[int]) -> npt.NDArray[np.int64]:
    if not set(map(type, values)) <= {int}:  # a bool is none
        raise ValueError(f"shards.{field} must be a list of integers")
    counts = np.array(values, np.int64)
    if (counts < 0).any():
        raise ValueError(f"shards.{field} must not be negative, is {counts.min()}")
    if counts.sum(dtype=np.float64) > MOST_COUNT:
        raise ValueError(f"shards.{field} must add up to at most {MOST_COUNT}")
    return counts


def leads_away(name: str) -> bool:
    """Whether a path is not, or not for every reader, below the folder that it is relative to."""
    return name.startswith("/") or "://" in name or bool({".", ".."} & {*name.split("/")})
