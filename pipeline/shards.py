"""One shard of a data set: which images go into it, and writing it so that a killed ingest goes on where it was.

A shard is a plain WebDataset tar. Its index is uploaded last and commits it: a tar without an index is written again.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import google_crc32c
import numpy as np
import webdataset

from pipeline import faults, hashing
from pipeline.errors import DatasetError
from pipeline.photo import CorruptImage, Photo, photo_from
from pipeline.shard_index import NO_LABEL, IndexRow, ShardIndex, Skipped
from pipeline.shard_table import INDEX_SUFFIX, ShardEntry
from pipeline.sources import Source, Sources
from pipeline.storage import Storage

SHARD_VERSION = 1
"""Part of every sources digest: shards written under other rules are not kept."""

_SHUFFLE = 0x53484152


@dataclass(frozen=True)
class ShardTask:
    """What one task writes: some sources, in this order."""

    name: str
    """Without a suffix, like ``shard-000012``."""
    root: str
    first_key: int
    sources: tuple[Source, ...]

    @property
    def digest(self) -> str:
        """Names the sources and their order; two tasks with one digest write the same shard."""
        rows = [[source.path, source.size_bytes, source.label] for source in self.sources]
        return hashlib.sha256(json.dumps([SHARD_VERSION, self.first_key, rows]).encode()).hexdigest()


@dataclass(frozen=True)
class ShardReport:
    """What came of a task."""

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


def plan_shards(sources: Sources, samples_per_shard: int, seed: int) -> list[ShardTask]:
    """Shuffle the sources and cut them into tasks of `samples_per_shard`, the last one smaller.

    Shuffled once here, neighbours in a shard are unrelated, so that a block read in one piece is already mixed.
    """
    total = len(sources.images)
    places = hashing.permuted(hashing.key(_SHUFFLE, seed), total, np.arange(total))
    tasks = []
    for number, start in enumerate(range(0, total, samples_per_shard)):
        chosen = tuple(sources.images[place] for place in places[start : start + samples_per_shard])
        tasks.append(ShardTask(f"shard-{number:06d}", sources.root, start, chosen))
    return tasks


def tar_url(destination: str, name: str) -> str:
    """Where a shard's images lie."""
    return Storage.join(destination, f"{name}.tar")


def index_url(destination: str, name: str) -> str:
    """Where a shard's index lies."""
    return Storage.join(destination, f"{name}{INDEX_SUFFIX}")


def write_shard(storage: Storage, destination: str, task: ShardTask) -> ShardReport:
    """Write one shard unless it is already there; the same sources give the same bytes.

    Args:
        storage: Reaches the sources and the destination.
        destination: Folder or prefix of the data set.
        task: What to write.

    Returns:
        What was written or found; corrupt images are skipped and listed there.

    Raises:
        StorageError: Unreachable, refused, or a full disk; shards committed before stay good.
    """
    finished = _finished(storage, destination, task)
    if finished is not None:
        return finished
    with tempfile.TemporaryDirectory(prefix="convmae-shard-") as folder:
        path = Path(folder) / "shard.tar"
        try:
            index = _write_tar(storage, task, path)
        except OSError as error:
            raise faults.translated(error, error.filename or str(path)) from error
        storage.upload(path, tar_url(destination, task.name))
    index = replace(index, tar_etag=storage.etag(tar_url(destination, task.name)))
    storage.write(index_url(destination, task.name), index.to_bytes())
    return ShardReport(ShardEntry.of(index), index.skipped, kept=False)


def _finished(storage: Storage, destination: str, task: ShardTask) -> ShardReport | None:
    url = index_url(destination, task.name)
    try:
        index = ShardIndex.from_bytes(storage.read(url), url)
        tar = tar_url(destination, task.name)
        unchanged = storage.size(tar) == index.tar_bytes and storage.etag(tar) == index.tar_etag
        whole = unchanged and index.sources_digest == task.digest
    except (FileNotFoundError, DatasetError):
        return None
    return ShardReport(ShardEntry.of(index), index.skipped, kept=True) if whole else None


def _write_tar(storage: Storage, task: ShardTask, path: Path) -> ShardIndex:
    rows = []
    skipped = []
    with path.open("wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, user="convmae", group="convmae", mode=0o444, mtime=0)
        for number, source in enumerate(task.sources, start=task.first_key):
            try:
                photo = photo_from(storage.read(Storage.join(task.root, source.path)))
            except (CorruptImage, FileNotFoundError) as error:
                skipped.append(Skipped(source.path, str(error)))
                continue
            key = f"{number:08d}"
            writer.write({"__key__": key, "jpg": photo.data} | _label_member(source))
            rows.append(_row(key, photo, source))
        writer.close()
    tar_bytes = path.stat().st_size
    return ShardIndex.from_rows(task.name, tar_bytes, task.digest, tuple(skipped), _located(path, rows))


def _label_member(source: Source) -> dict[str, bytes]:
    return {} if source.label is None else {"cls": str(source.label).encode()}


def _row(key: str, photo: Photo, source: Source) -> IndexRow:
    label = NO_LABEL if source.label is None else source.label
    crc = google_crc32c.value(photo.data)
    return IndexRow(key, 0, len(photo.data), crc, photo.height, photo.width, label)


def _located(path: Path, rows: list[IndexRow]) -> list[IndexRow]:
    """Fill in the offsets, as a reader of the finished tar finds them."""
    with tarfile.open(path) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    return [row._replace(offset=offsets[f"{row.key}.jpg"]) for row in rows]
