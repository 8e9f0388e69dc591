"""Indexing a WebDataset tar that was made elsewhere: one pass over its bytes, none of them rewritten."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial

import google_crc32c

from pipeline.errors import DatasetError
from pipeline.image import bands, other_formats
from pipeline.image.channels import RGB_PIXELS, PixelKind
from pipeline.image.decode import decode
from pipeline.image.photo import CorruptImage
from pipeline.ingest.source import Tar
from pipeline.ingest.writer import is_unchanged
from pipeline.shard.index import NO_LABEL, IndexRow, ShardIndex, Skipped
from pipeline.shard.table import ShardEntry, ShardReport
from pipeline.shard.tar_samples import Measured, TarContents, read_samples
from pipeline.shard.tar_scan import RangedFile, TarFault
from pipeline.store.storage import Storage

INDEXING_VERSION = 2
"""Part of every digest: indexes made under other rules are not kept."""


@dataclass(frozen=True)
class IndexTask:
    """One tar to index."""

    root: str
    tar: Tar
    deep: bool
    """Decode every image, and skip those that do not decode; else only their headers are read."""
    salvage: bool
    """Index what is left of a damaged tar; else it is not indexed."""
    pixels: PixelKind = RGB_PIXELS
    """To what images are to be decoded; those of other bands or bits are skipped, but for photographs."""

    @property
    def name(self) -> str:
        """Name of the shard: the tar's path without its suffix."""
        return self.tar.path.text[: -len(".tar")]

    @property
    def digest(self) -> str:
        """Identifies the tar and how it is indexed."""
        parts = [INDEXING_VERSION, self.tar.path.text, self.tar.size_bytes, self.deep]
        if not self.pixels.is_photographic:
            parts += [self.pixels.channels, self.pixels.bits]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def salvage_digest(self) -> str:
        """The digest in the index of a damaged tar: an ingest that wants whole tars does not keep that index."""
        return hashlib.sha256(f"salvaged {self.digest}".encode()).hexdigest()


@dataclass(frozen=True)
class TarReport:
    """The result of indexing a tar."""

    name: str
    report: ShardReport | None
    """None where it is damaged and was not to be salvaged."""
    faults: tuple[TarFault, ...] = ()
    bad_labels: int = 0

    @property
    def samples(self) -> int:
        """In the index."""
        return self.report.samples if self.report else 0

    @property
    def skipped(self) -> int:
        """Images that cannot be used, and damaged places."""
        return len(self.report.skipped) if self.report else len(self.faults)

    @property
    def kept(self) -> bool:
        """Whether an earlier run had already indexed it."""
        return self.report is not None and self.report.kept


def index_tar(storage: Storage, destination: str, task: IndexTask) -> TarReport:
    """Write the index of one tar, unless it is there already.

    Raises:
        DatasetError: The tar changed meanwhile.
        StorageError: Unreachable, refused, or a full disk.
    """
    url = task.tar.path.url(task.root)
    entry_tar = _place(destination, task)
    if (kept := _kept(storage, destination, task, url)) is not None:
        return TarReport(task.name, ShardReport(ShardEntry.of(kept, entry_tar), kept.skipped, kept=True))
    etag, size = storage.etag(url), storage.size(url)
    measure = partial(_measured_deep if task.deep else _measured, pixels=task.pixels)
    with RangedFile(lambda offset, length: storage.read_range(url, offset, length), size) as file:
        contents = read_samples(file, salvage=task.salvage, measure=measure)
    if contents.faults and not task.salvage:
        return TarReport(task.name, None, tuple(contents.faults))
    if (storage.etag(url), storage.size(url)) != (etag, size):
        raise DatasetError("tar", "must not change while it is indexed", url, "run the same command again")
    index = _index(task, contents, size, etag)
    entry = ShardEntry.of(index, entry_tar)
    storage.write(entry.index_url(destination), index.to_bytes())
    report = ShardReport(entry, index.skipped, kept=False)
    return TarReport(task.name, report, tuple(contents.faults), contents.bad_labels)


def _place(destination: str, task: IndexTask) -> str:
    """The tar's place in the manifest: its name alone where it lies beside it, else its URL."""
    if destination.rstrip("/") != task.root.rstrip("/"):
        return task.tar.path.url(task.root)
    return "" if task.tar.path.text == f"{task.name}.tar" else task.tar.path.text


def _kept(storage: Storage, destination: str, task: IndexTask, url: str) -> ShardIndex | None:
    place = Storage.join(destination, f"{task.name}.index")
    accepted = (task.digest, task.salvage_digest) if task.salvage else (task.digest,)
    try:
        index = ShardIndex.from_bytes(storage.read(place), place)
    except (FileNotFoundError, DatasetError):
        return None
    return index if index.sources_digest in accepted and is_unchanged(storage, url, index) else None


def _index(task: IndexTask, contents: TarContents, size: int, etag: str | None) -> ShardIndex:
    path = task.tar.path
    skipped = [Skipped(f"{path} at byte {fault.offset}", fault.what) for fault in contents.faults]
    skipped += [Skipped(f"{path}: {item.path}", item.reason) for item in contents.skipped]
    digest = task.salvage_digest if contents.faults else task.digest
    rows = []
    for image in contents.images:
        assert image.measured
        label = NO_LABEL if image.label is None else image.label
        rows.append(IndexRow(image.key, image.offset, image.length, *image.measured, label, image.extension))
    return ShardIndex.from_rows(task.name, size, digest, tuple(skipped), rows, tar_etag=etag)


def _measured(data: bytes, pixels: PixelKind) -> Measured:
    try:
        if not pixels.is_photographic:
            return Measured(google_crc32c.value(data), *bands.band_size(data, pixels.channels, pixels.bits))
        height, width = other_formats.size_of(data)
        other_formats.refuse_bomb(height, width)
    except ValueError as error:
        raise CorruptImage(str(error)) from error
    return Measured(google_crc32c.value(data), height, width)


def _measured_deep(data: bytes, pixels: PixelKind) -> Measured:
    try:
        height, width, _ = decode(data, pixels.channels, pixels.bits).shape
    except ValueError as error:
        raise CorruptImage(str(error)) from error
    return Measured(google_crc32c.value(data), height, width)
