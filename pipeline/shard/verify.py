"""Verification of a shard against its index and the manifest: every difference is one fault, with its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import google_crc32c

from pipeline.errors import DatasetError, clipped
from pipeline.image.channels import RGB_PIXELS, PixelKind
from pipeline.image.decode import Decoder, decode
from pipeline.shard.index import NO_LABEL, IndexRow, ShardIndex
from pipeline.shard.table import ShardEntry
from pipeline.shard.tar_samples import cls_label
from pipeline.shard.tar_scan import RangedFile, TarFault, TarMember, scan_tar
from pipeline.store.storage import Storage

LARGEST_LABEL_BYTES = 64


@dataclass(frozen=True)
class Fault:
    """One difference between a shard and what its index or the manifest says."""

    shard: str
    key: str | None
    """Of the sample; None where the fault is of the whole shard or of no sample."""
    offset: int | None
    """Byte in the tar; None where the fault has no place in it."""
    what: str

    @property
    def line(self) -> str:
        """The fault in one line, for people."""
        places = [self.shard, self.key and f"key {self.key}", None if self.offset is None else f"offset {self.offset}"]
        return f"{', '.join(place for place in places if place)}: {self.what}"


@dataclass(frozen=True)
class Verdict:
    """The result of verifying a shard."""

    shard: str
    samples: int
    tar_bytes: int
    faults: tuple[Fault, ...]


def verify_shard(
    storage: Storage, url: str, entry: ShardEntry, *, deep: bool, pixels: PixelKind = RGB_PIXELS
) -> Verdict:
    """Read a shard and its index from the first byte to the last; memory stays within a few chunks and the index.

    Args:
        storage: Reaches the dataset.
        url: Of the dataset.
        entry: The shard as the manifest lists it.
        deep: Also decode every image.
        pixels: To what.

    Raises:
        StorageError: The store cannot be reached; that says nothing about the shard.
    """
    try:
        index = ShardIndex.from_bytes(storage.read(entry.index_url(url)), entry.index_url(url))
    except FileNotFoundError:
        faults = [Fault(entry.name, None, None, f"its index is missing: {entry.index_url(url)}")]
    except DatasetError as error:
        faults = [Fault(entry.name, None, None, f"its index is damaged: {error.value}")]
    else:
        faults = list(_index_faults(index, entry))
        index = replace(index, tar_bytes=entry.tar_bytes, tar_etag=entry.etag)
        decoder = partial(decode, channels=pixels.channels, bits=pixels.bits) if deep else None
        faults += tar_faults(storage, entry.tar_url(url), index, decoder)
        return Verdict(entry.name, entry.samples, entry.tar_bytes, tuple(_named(entry, fault) for fault in faults))
    faults += list(_structure_alone(storage, entry, url))
    return Verdict(entry.name, entry.samples, entry.tar_bytes, tuple(faults))


def tar_faults(storage: Storage, url: str, index: ShardIndex, decoder: Decoder | None = None) -> list[Fault]:
    """Differences of a tar from its index: size, ETag, headers, names, labels and CRC32C of every sample."""
    name = index.shard
    try:
        size, etag = storage.size(url), storage.etag(url)
    except FileNotFoundError:
        return [Fault(name, None, None, f"the tar is missing: {url}")]
    faults = []
    if size != index.tar_bytes:
        faults.append(Fault(name, None, min(size, index.tar_bytes), f"has {size} bytes instead of {index.tar_bytes}"))
    if index.tar_etag is not None and etag != index.tar_etag:
        faults.append(Fault(name, None, None, f"was replaced: its ETag is {etag} instead of {index.tar_etag}"))
    with RangedFile(lambda offset, length: storage.read_range(url, offset, length), size) as file:
        return faults + list(_content_faults(file, index, decoder))


def _content_faults(file: RangedFile, index: ShardIndex, decoder: Decoder | None) -> Iterator[Fault]:
    """Scan the tar once, checking the images of the index where they are met; then the others."""
    rows: dict[int, IndexRow] = {}
    for listed in map(index.row, range(len(index))):
        flaw = listed.flaw(index.tar_bytes)
        if not flaw and listed.offset in rows:
            flaw = f"its place is that of {rows[listed.offset].member}"
        if flaw:
            yield Fault(index.shard, listed.key, listed.offset, f"the index cannot be right of {listed.member}: {flaw}")
        else:
            rows[listed.offset] = listed
    labels = {row.key: row for row in rows.values() if row.label != NO_LABEL}
    known = {(item.path.rpartition(" at byte ")[2], item.reason) for item in index.skipped}
    for item in scan_tar(file):
        if isinstance(item, TarFault):
            if (str(item.offset), item.what) not in known:  # a salvaged tar is as damaged as when it was indexed
                yield Fault(index.shard, None, item.offset, item.what)
            continue
        row = rows.pop(item.data_offset, None)
        if row is not None:
            if (item.name, item.size) != (row.member, row.length):
                found = f"{clipped(item.name)} of {item.size}"
                what = f"the index has {row.member} of {row.length} bytes, the tar {found}"
                yield Fault(index.shard, row.key, row.offset, what)
            yield from _image_faults(file, index.shard, row, decoder)
        elif item.name.endswith(".cls") and not item.obstacle and item.size <= LARGEST_LABEL_BYTES:
            yield from _label_faults(file, index.shard, labels, item)
    for row in rows.values():
        # Readers find an image by the index alone, so that a damaged header loses it only for others.
        lost = Fault(index.shard, row.key, row.offset, f"the tar has no member {row.member} here, though its bytes are")
        yield from list(_image_faults(file, index.shard, row, decoder)) or [lost]


def _image_faults(file: RangedFile, shard: str, row: IndexRow, decoder: Decoder | None) -> Iterator[Fault]:
    file.seek(row.offset)
    data = file.read(row.length)
    if len(data) != row.length:
        yield Fault(shard, row.key, row.offset, f"{row.member} ends after {len(data)} of {row.length} bytes")
    elif google_crc32c.value(data) != row.crc:
        yield Fault(shard, row.key, row.offset, f"{row.member} does not have the CRC32C of the index")
    elif decoder:
        yield from _pixel_faults(data, shard, row, decoder)


def _pixel_faults(data: bytes, shard: str, row: IndexRow, decoder: Decoder) -> Iterator[Fault]:
    try:
        height, width, _ = decoder(data).shape
    except ValueError as error:
        yield Fault(shard, row.key, row.offset, f"{row.member} does not decode: {error}")
        return
    if (height, width) != (row.height, row.width):
        what = f"{row.member} is {width} x {height}, in the index {row.width} x {row.height}"
        yield Fault(shard, row.key, row.offset, what)


def _label_faults(file: RangedFile, shard: str, labels: dict[str, IndexRow], member: TarMember) -> Iterator[Fault]:
    row = labels.get(member.name.removesuffix(".cls"))
    if row is None:
        return
    file.seek(member.data_offset)
    data = file.read(member.size)
    try:
        label = cls_label(data)
    except ValueError:
        label = None
    if label != row.label:
        what = f"{clipped(member.name)} has the label {data.decode(errors='replace')!r}, the index {row.label}"
        yield Fault(shard, row.key, member.data_offset, what)


def _structure_alone(storage: Storage, entry: ShardEntry, url: str) -> Iterator[Fault]:
    """Faults of a tar whose index is lost, by its structure alone."""
    place = entry.tar_url(url)
    try:
        size = storage.size(place)
    except FileNotFoundError:
        yield _whole(entry, f"the tar is missing: {place}")
        return
    if size != entry.tar_bytes:
        yield Fault(entry.name, None, min(size, entry.tar_bytes), f"has {size} bytes instead of {entry.tar_bytes}")
    with RangedFile(lambda offset, length: storage.read_range(place, offset, length), size) as file:
        for item in scan_tar(file):
            if isinstance(item, TarFault):
                yield Fault(entry.name, None, item.offset, item.what)


def _index_faults(index: ShardIndex, entry: ShardEntry) -> Iterator[Fault]:
    if index.digest != entry.index_sha256:
        yield _whole(entry, "its index is not the manifest's")
    if len(index) != entry.samples:
        yield _whole(entry, f"its index has {len(index)} samples, the manifest {entry.samples}")


def _whole(entry: ShardEntry, what: str) -> Fault:
    return Fault(entry.name, None, None, what)


def _named(entry: ShardEntry, fault: Fault) -> Fault:
    return replace(fault, shard=entry.name)
