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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from pipeline.shard.tar_samples import TarContents, read_samples
from pipeline.shard.tar_scan import RangedFile, TarFault
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

LISTING_VERSION = 4
MOST_FOLDERS = 100_000
"""Of one tar's images; more are no classes, and would fill the memory."""

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
    folders: tuple[str, ...]
    """Of its images, without a dot or slash at either end; empty if they are too many."""
    places: npt.NDArray[np.int64]
    """The folder of each image, by number."""

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
            "folders": self.folders,
        }
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        output = io.BytesIO()
        columns = {name: getattr(self, name) for name in _COLUMNS}
        np.savez_compressed(output, header=text, **columns)
        return output.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> TarListing:
        """Read a listing; ValueError if it is not one."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                header = parsed_object(arrays["header"].tobytes())
                columns = {name: _column(arrays[name]) for name in _COLUMNS}
            if header["version"] != LISTING_VERSION:
                raise ValueError(f"version {header['version']}")
            if len({len(column) for column in columns.values()}) != 1:
                raise ValueError("its columns differ in length")
            tar, bad_labels = header["tar"], _count(header["bad_labels"])
            skipped = tuple(Skipped(_text(path), _text(reason)) for path, reason in header["skipped"])
            faults = tuple(TarFault(_count(offset), _text(what)) for offset, what in header["faults"])
            tar = Tar(Listed(_text(tar[0])), _count(tar[1]))
            folders, places = tuple(map(_text, header["folders"])), columns["places"]
            if len(places) and not 0 <= places.min() <= places.max() < max(1, len(folders)):
                raise ValueError("an image lies in no folder")
        except _NO_LISTING as error:
            raise ValueError(f"no listing: {error}") from error
        return cls(tar, **columns, skipped=skipped, faults=faults, bad_labels=bad_labels, folders=folders)


_COLUMNS = ("offsets", "lengths", "labels", "places")


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
    has_labels: bool
    """Whether any image has one."""
    folders: tuple[str, ...]
    """Of its images; empty if they are too many."""
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
    listing = listing_of(tar, contents)
    storage.write(place, listing.to_bytes())
    return _summary(listing, place, kept=False)


def listing_of(tar: Tar, contents: TarContents) -> TarListing:
    """What is kept of a tar that was scanned."""
    images = contents.images
    folders, places = _folders([image.key for image in images])
    return TarListing(
        tar,
        np.array([image.offset for image in images], "<i8"),
        np.array([image.length for image in images], "<i8"),
        np.array([NO_LABEL if image.label is None else image.label for image in images], "<i8"),
        tuple(Skipped(f"{tar.path}: {item.path}", item.reason) for item in contents.skipped),
        tuple(contents.faults),
        contents.bad_labels,
        folders,
        places,
    )


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
    return TarSummary(
        listing.tar,
        url,
        len(listing),
        listing.skipped,
        listing.faults,
        listing.bad_labels,
        bool((listing.labels != NO_LABEL).any()),
        listing.folders,
        kept,
    )


def _folders(keys: Sequence[str]) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """The folders of samples, and which of them each lies in."""
    named = [key.rpartition("/")[0].removeprefix("./").strip("/") for key in keys]
    numbers = {name: number for number, name in enumerate(sorted(set(named)))}
    if len(numbers) > MOST_FOLDERS:
        return (), np.zeros(len(keys), "<i8")
    return tuple(numbers), np.array([numbers[name] for name in named], "<i8")


def class_folders(summaries: Sequence[TarSummary]) -> dict[str, str]:
    """The class of each folder in tars whose images have no labels, as for a folder of class folders; empty for none.

    Folders are classes where some tar has several: tars of shards often have one folder each, which is named after the
    shard. What all folders begin with is no class.
    """
    folders = sorted({folder for summary in summaries for folder in summary.folders})
    if any(summary.has_labels or (summary.samples and not summary.folders) for summary in summaries):
        return {}
    if not any(len(summary.folders) > 1 for summary in summaries) or "" in folders:
        return {}
    paths = [folder.split("/") for folder in folders]
    shared = next((n for n, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths)))
    if any(len(path) == shared for path in paths):  # images beside class folders
        return {}
    return {folder: path[shared] for folder, path in zip(folders, paths, strict=True)}


def _name(task: TarTask, etag: str | None) -> str:
    parts = [task.root, task.tar.path.text, task.tar.size_bytes, etag]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class TarImages(Sequence[Source]):
    """The images of many tars, in the tars' order, as rows of a temporary file: 28 bytes of disk each, no memory."""

    def __init__(self, listings: Iterable[TarListing], labels: Mapping[str, int] | None = None) -> None:
        """Lay them out.

        Args:
            listings: Of the tars.
            labels: Of images by their folder, where they have none of their own.
        """
        self._paths: list[Listed] = []
        with tempfile.TemporaryFile(prefix="convmae-images-") as file:
            for number, listing in enumerate(listings):
                self._paths.append(listing.tar.path)
                rows = np.zeros(len(listing), _ROW)
                rows["tar"], rows["offset"], rows["length"] = number, listing.offsets, listing.lengths
                rows["label"] = listing.labels
                if labels:
                    rows["label"] = np.array([labels[folder] for folder in listing.folders], "<i8")[listing.places]
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
