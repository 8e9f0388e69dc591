"""Tars as sources: which ones are meant, and where their images lie, kept so that a killed scan resumes where it was.

A tar is scanned once by `list_tar`, and its listing kept under the destination. Thereafter its images are ranges
that any task reads by itself.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import itertools
import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from pipeline.access.places import Listed
from pipeline.access.urls import is_web
from pipeline.errors import SourceError
from pipeline.ingest.braces import expanded
from pipeline.ingest.source import Source, Tar, Tars, address
from pipeline.shard.index import NO_LABEL, Skipped
from pipeline.shard.tar_samples import read_samples
from pipeline.shard.tar_scan import RangedFile, TarFault
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

LISTING_VERSION = 3

_LISTINGS_AT_ONCE = 16

_NO_LISTING = (
    LookupError,
    TypeError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    MemoryError,
)
"""What numpy, zipfile and zlib raise for bytes that are no listing, beside ValueError."""
_ROW = np.dtype([("tar", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("label", "<i8")])
_WILD = re.compile(r"[*?\[]")


def is_pattern(source: str) -> bool:
    """Whether a name may stand for several."""
    return _is_wild(source) or "{" in source


def _is_wild(source: str) -> bool:
    """Whether a name holds wildcards; in an http address a question mark begins the query."""
    return bool(_WILD.search(address(source)))


def matching_tars(storage: Storage, pattern: str) -> Tars:
    """The tars that a pattern with braces, as webdataset takes them, or wildcards names.

    Raises:
        SourceError: A tar that braces name is missing, nothing matches, or the braces stand for too many names.
    """
    names = expanded(pattern)
    root = _fixed_part(pattern)
    sizes = _sizes(storage, root, pattern)
    chosen: dict[str, None] = {}
    for wanted in names:
        relative = wanted.removeprefix(root).lstrip("/")
        if _is_wild(wanted):
            found = [path for path in sizes if path == relative or _matches(path, relative)]
        elif relative in sizes:
            found = [relative]
        else:
            raise SourceError("source", "must exist", wanted, "check the numbers in the braces")
        chosen |= dict.fromkeys(sorted(found))
    if not chosen:
        raise SourceError("source", "must match at least one tar", pattern, f"{len(sizes)} files lie under {root}")
    return Tars(root, tuple(Tar(Listed(path), sizes[path]) for path in sorted(chosen)))


def _sizes(storage: Storage, root: str, pattern: str) -> dict[str, int]:
    """Bytes of the files that may be meant, by their paths below `root`."""
    if not is_web(root):
        return storage.list_files(root) if storage.list_names(root) else {}

    def asked(url: str) -> int | None:
        try:
            return storage.size(url)
        except FileNotFoundError:
            return None

    urls = [url for url in expanded(pattern) if not _is_wild(url)]  # web servers have no listings
    with ThreadPoolExecutor(_LISTINGS_AT_ONCE, thread_name_prefix="sizes") as threads:
        found = zip(urls, threads.map(asked, urls), strict=True)
        return {url.removeprefix(root).lstrip("/"): size for url, size in found if size is not None}


def _fixed_part(pattern: str) -> str:
    """The folder above the first variable character."""
    first = min(place for place in map(pattern.find, "*?[{") if place >= 0)
    return pattern[:first].rpartition("/")[0]


def _matches(path: str, pattern: str) -> bool:
    names, wanted = path.split("/"), pattern.split("/")
    return len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted))


@dataclass(frozen=True, eq=False)
class TarListing:
    """Places of the images of one tar."""

    tar: Tar
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    """NO_LABEL where there is none."""
    skipped: tuple[Skipped, ...]
    faults: tuple[TarFault, ...]
    bad_labels: int

    def __len__(self) -> int:
        return len(self.offsets)

    def to_bytes(self) -> bytes:
        """The listing as a file."""
        header = {
            "version": LISTING_VERSION,
            "tar": [self.tar.path.text, self.tar.size_bytes],
            "skipped": [[item.path, item.reason] for item in self.skipped],
            "faults": [list(fault) for fault in self.faults],
            "bad_labels": self.bad_labels,
        }
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        output = io.BytesIO()
        np.savez_compressed(output, header=text, offsets=self.offsets, lengths=self.lengths, labels=self.labels)
        return output.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> TarListing:
        """Read a listing; ValueError if it is not one."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                header = parsed_object(arrays["header"].tobytes())
                columns = {name: _column(arrays[name]) for name in ("offsets", "lengths", "labels")}
            if header["version"] != LISTING_VERSION:
                raise ValueError(f"version {header['version']}")
            if len({len(column) for column in columns.values()}) != 1:
                raise ValueError("its columns differ in length")
            tar, bad_labels = header["tar"], _count(header["bad_labels"])
            skipped = tuple(Skipped(_text(path), _text(reason)) for path, reason in header["skipped"])
            faults = tuple(TarFault(_count(offset), _text(what)) for offset, what in header["faults"])
            tar = Tar(Listed(_text(tar[0])), _count(tar[1]))
        except _NO_LISTING as error:
            raise ValueError(f"no listing: {error}") from error
        return cls(tar, **columns, skipped=skipped, faults=faults, bad_labels=bad_labels)


def _column(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if values.dtype != np.dtype("<i8") or values.ndim != 1:
        raise ValueError("a column holds no integers")
    return values


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a count is none")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is none")
    return value


@dataclass(frozen=True)
class TarTask:
    """One tar to scan."""

    root: str
    tar: Tar


@dataclass(frozen=True)
class TarSummary:
    """Counts of one tar's images; where they lie is in the listing."""

    tar: Tar
    listing: str
    """URL."""
    samples: int
    skipped: tuple[Skipped, ...]
    faults: tuple[TarFault, ...]
    bad_labels: int
    kept: bool
    """Whether an earlier run had already scanned it."""


def list_tar(storage: Storage, folder: str, task: TarTask) -> TarSummary:
    """Find the images of a tar and keep the listing, or take what an earlier run kept.

    Images after a damaged place are found, too, and the place is listed.

    Args:
        storage: Reaches the tar and the listings.
        folder: Where listings are kept.
        task: The tar to scan.
    """
    tar, url = task.tar, task.tar.path.url(task.root)
    place = Storage.join(folder, f"{_name(task, storage.etag(url))}.npz")
    if (kept := _kept_listing(storage, place)) is not None and kept.tar == tar:
        return _summary(kept, place, kept=True)
    with RangedFile(lambda offset, length: storage.read_range(url, offset, length), tar.size_bytes) as file:
        contents = read_samples(file, salvage=True)
    images = contents.images
    listing = TarListing(
        tar,
        np.array([image.offset for image in images], "<i8"),
        np.array([image.length for image in images], "<i8"),
        np.array([NO_LABEL if image.label is None else image.label for image in images], "<i8"),
        tuple(Skipped(f"{tar.path}: {item.path}", item.reason) for item in contents.skipped),
        tuple(contents.faults),
        contents.bad_labels,
    )
    storage.write(place, listing.to_bytes())
    return _summary(listing, place, kept=False)


def _kept_listing(storage: Storage, place: str) -> TarListing | None:
    """The listing that an earlier ingest kept of a tar; None where it cannot be read."""
    try:
        data = storage.read(place)
    except FileNotFoundError:
        return None
    try:
        return TarListing.from_bytes(data)
    except ValueError:
        return None


def read_listings(storage: Storage, summaries: Iterable[TarSummary]) -> Iterator[TarListing]:
    """The listings in order, a few at a time."""
    waiting = iter(summaries)
    with ThreadPoolExecutor(_LISTINGS_AT_ONCE, thread_name_prefix="listings") as threads:
        while some := list(itertools.islice(waiting, _LISTINGS_AT_ONCE)):
            yield from map(TarListing.from_bytes, threads.map(storage.read, [summary.listing for summary in some]))


def _summary(listing: TarListing, url: str, *, kept: bool) -> TarSummary:
    return TarSummary(listing.tar, url, len(listing), listing.skipped, listing.faults, listing.bad_labels, kept)


def _name(task: TarTask, etag: str | None) -> str:
    parts = [task.root, task.tar.path.text, task.tar.size_bytes, etag]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class TarImages(Sequence[Source]):
    """The images of many tars, in the tars' order, as rows of a temporary file: 28 bytes of disk each, no memory."""

    def __init__(self, listings: Iterable[TarListing]) -> None:
        self._paths: list[Listed] = []
        with tempfile.TemporaryFile(prefix="convmae-images-") as file:
            for number, listing in enumerate(listings):
                self._paths.append(listing.tar.path)
                rows = np.zeros(len(listing), _ROW)
                rows["tar"], rows["offset"], rows["length"] = number, listing.offsets, listing.lengths
                rows["label"] = listing.labels
                file.write(rows.tobytes())
            file.flush()
            size = file.tell() // _ROW.itemsize
            # The mapping keeps the nameless file until it is dropped itself.
            self._rows = np.memmap(file, _ROW, "r", shape=(size,)) if size else np.zeros(0, _ROW)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Source: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Source]: ...
    def __getitem__(self, place: int | slice) -> Source | Sequence[Source]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        tar, offset, length, label = self._rows[place].item()
        return Source(self._paths[tar], length, None if label == NO_LABEL else label, offset)
