"""The index beside a shard: where each image lies in the tar, and its checksum.

A NumPy .npz without pickled objects; the same shard gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import DatasetError

INDEX_VERSION = 1
NO_LABEL = -1

_COLUMNS = ("keys", "offsets", "lengths", "crcs", "heights", "widths", "labels")


class IndexRow(NamedTuple):
    """One sample; the fields are those of ShardIndex."""

    key: str
    offset: int
    length: int
    crc: int
    height: int
    width: int
    label: int


@dataclass(frozen=True)
class Skipped:
    """An image that did not make it into a shard."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Columns over a shard's samples, each (n,), in the tar's order."""

    shard: str
    tar_bytes: int
    sources_digest: str
    skipped: tuple[Skipped, ...]
    keys: npt.NDArray[np.bytes_]
    offsets: npt.NDArray[np.int64]
    """Byte in the tar at which the image begins."""
    lengths: npt.NDArray[np.int64]
    crcs: npt.NDArray[np.uint32]
    """CRC32C of the image's bytes."""
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    """NO_LABEL where there is none."""

    @classmethod
    def from_rows(
        cls, shard: str, tar_bytes: int, sources_digest: str, skipped: tuple[Skipped, ...], rows: list[IndexRow]
    ) -> ShardIndex:
        """Turn rows, in the tar's order, into columns."""
        return cls(
            shard,
            tar_bytes,
            sources_digest,
            skipped,
            keys=np.array([row.key.encode() for row in rows], np.bytes_),
            offsets=np.array([row.offset for row in rows], "<i8"),
            lengths=np.array([row.length for row in rows], "<i8"),
            crcs=np.array([row.crc for row in rows], "<u4"),
            heights=np.array([row.height for row in rows], "<i4"),
            widths=np.array([row.width for row in rows], "<i4"),
            labels=np.array([row.label for row in rows], "<i4"),
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Memory that the columns take."""
        return sum(int(getattr(self, name).nbytes) for name in _COLUMNS)

    def to_bytes(self) -> bytes:
        """The index as a file."""
        header = {
            "index_version": INDEX_VERSION,
            "shard": self.shard,
            "tar_bytes": self.tar_bytes,
            "sources_digest": self.sources_digest,
            "skipped": [[skipped.path, skipped.reason] for skipped in self.skipped],
        }
        text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
        output = io.BytesIO()
        np.savez(output, header=text, **{name: getattr(self, name) for name in _COLUMNS})
        return output.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> ShardIndex:
        """Read an index.

        Args:
            data: The whole file.
            url: Where it came from, for the message.

        Raises:
            DatasetError: It is no index, or one of another version.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                columns = {name: arrays[name] for name in _COLUMNS}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DatasetError("shard index", "must be whole", url, f"shard the data set again ({error})") from error
        if header["index_version"] != INDEX_VERSION:
            rule = f"must have version {INDEX_VERSION}"
            raise DatasetError(
                "shard index", rule, header["index_version"], f"read {url} with the release that wrote it"
            )
        skipped = tuple(Skipped(path, reason) for path, reason in header["skipped"])
        return cls(header["shard"], header["tar_bytes"], header["sources_digest"], skipped, **columns)


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()
