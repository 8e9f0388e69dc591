"""One shard of a dataset: written so that a killed ingest resumes where it was.

A shard is a plain WebDataset tar. Its index is uploaded last and commits it: a tar without an index is written again.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import google_crc32c

from pipeline.access import faults
from pipeline.errors import DatasetError, RefusedError
from pipeline.host.scratch import scratch_folder
from pipeline.image.photo import CorruptImage, Photo, photo_from
from pipeline.ingest.plan import ShardTask
from pipeline.ingest.source import Source
from pipeline.ingest.source_reader import SourceReader
from pipeline.shard.index import NO_LABEL, IndexRow, ShardIndex, Skipped
from pipeline.shard.table import INDEX_SUFFIX, ShardEntry, ShardReport
from pipeline.shard.verify import tar_faults
from pipeline.store.storage import Storage

READ_THREADS = 8
"""Readers ahead of a task's decoding, since a single read from a far store takes longer than a decode."""
READ_AHEAD = 16


def tar_url(destination: str, name: str) -> str:
    """URL of a shard's tar."""
    return Storage.join(destination, f"{name}.tar")


def index_url(destination: str, name: str) -> str:
    """URL of a shard's index."""
    return Storage.join(destination, f"{name}{INDEX_SUFFIX}")


def write_shard(storage: Storage, destination: str, task: ShardTask) -> ShardReport:
    """Write one shard unless it is already there; the same sources give the same bytes.

    Args:
        storage: Reaches the sources and the destination.
        destination: Folder or prefix of the dataset.
        task: What to write.

    Returns:
        What was written or found; corrupt images are skipped and listed there.

    Raises:
        StorageError: Unreachable, refused, or a full disk; shards committed before stay good.
    """
    finished = _finished(storage, destination, task)
    if finished is not None:
        return finished
    with scratch_folder() as folder:
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
    """The report of a shard that an earlier ingest finished, if every byte is still as it was."""
    url, tar = index_url(destination, task.name), tar_url(destination, task.name)
    try:
        index = ShardIndex.from_bytes(storage.read(url), url)
        whole = index.sources_digest == task.digest and is_unchanged(storage, tar, index)
    except (FileNotFoundError, DatasetError):
        return None
    return ShardReport(ShardEntry.of(index), index.skipped, kept=True) if whole else None


def is_unchanged(storage: Storage, url: str, index: ShardIndex) -> bool:
    """Whether a tar still has the bytes that its index was made of."""
    if index.tar_etag is None:
        return not tar_faults(storage, url, index)
    try:  # the store vouches for the bytes that it named so when they were written
        return (storage.size(url), storage.etag(url)) == (index.tar_bytes, index.tar_etag)
    except FileNotFoundError:
        return False


def _write_tar(storage: Storage, task: ShardTask, path: Path) -> ShardIndex:
    import webdataset  # it imports torch: seconds, and 200 MB, which those who only index or verify are spared

    rows = []
    skipped = []
    reader = SourceReader(storage, task.root)
    with path.open("wb") as file, contextlib.closing(_read_ahead(reader, task)) as images:
        writer = webdataset.TarWriter(file, encoder=False, user="convmae", group="convmae", mode=0o444, mtime=0)
        for number, (source, image) in enumerate(images, start=task.first_key):
            try:
                photo = photo_from(image.result(), task.encoding)
            except FileNotFoundError:
                skipped.append(Skipped(source.name, "it is gone"))
                continue
            except RefusedError as error:
                skipped.append(Skipped(source.name, error.remedy))
                continue
            except CorruptImage as error:
                skipped.append(Skipped(source.name, str(error)))
                continue
            key = f"{number:08d}"
            writer.write({"__key__": key, photo.extension: photo.data} | _label_member(source))
            rows.append(_row(key, photo, source))
        writer.close()
    reader.check()
    tar_bytes = path.stat().st_size
    return ShardIndex.from_rows(task.name, tar_bytes, task.digest, tuple(skipped), _located(path, rows))


def _read_ahead(reader: SourceReader, task: ShardTask) -> Generator[tuple[Source, Future[bytes]], None, None]:
    """The sources in order, each with its bytes on the way; a bounded number at once."""
    threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="sources")
    waiting: deque[tuple[Source, Future[bytes]]] = deque()
    try:
        for source in task.sources:
            waiting.append((source, threads.submit(reader.read, source)))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        threads.shutdown(cancel_futures=True)


def _label_member(source: Source) -> dict[str, bytes]:
    return {} if source.label is None else {"cls": str(source.label).encode()}


def _row(key: str, photo: Photo, source: Source) -> IndexRow:
    label = NO_LABEL if source.label is None else source.label
    crc = google_crc32c.value(photo.data)
    return IndexRow(key, 0, len(photo.data), crc, photo.height, photo.width, label, photo.extension)


def _located(path: Path, rows: list[IndexRow]) -> list[IndexRow]:
    """Fill in the offsets, as a reader of the finished tar finds them."""
    with tarfile.open(path) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    return [row._replace(offset=offsets[row.member]) for row in rows]
