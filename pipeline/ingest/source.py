"""Sources of an ingest: images as they were found, and tars whose images are not known yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.access.places import Given, Listed
from pipeline.access.urls import is_local
from pipeline.errors import RefusedError
from pipeline.shard.index import LARGEST_IMAGE_BYTES
from pipeline.shard.tar_samples import IMAGE_EXTENSIONS
from pipeline.store.storage import Storage

IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)


@dataclass(frozen=True, slots=True)
class Source:
    """One image as it was found: a file, or a range of a tar."""

    path: Listed | Given
    """Of the file or tar: found below the sources' root, or as a list of files has it."""
    size_bytes: int | None
    """Of the image; None where it was not asked for."""
    label: int | None
    offset: int | None = None
    """Byte in the tar at which the image begins; None for a file."""

    @property
    def name(self) -> str:
        """The image's name for people."""
        return str(self.path) if self.offset is None else f"{self.path} at byte {self.offset}"

    def read(self, storage: Storage, root: str) -> bytes:
        """The image's bytes.

        Raises:
            FileNotFoundError: It is gone.
            RefusedError: It is larger than any image, or no file, or its name leads elsewhere.
        """
        url = self.path.url(root)
        if self.offset is None:
            return self._read_file(storage, url)
        assert self.size_bytes is not None
        return storage.read_range(url, self.offset, self.size_bytes)

    def _read_file(self, storage: Storage, url: str) -> bytes:
        size = storage.size(url) if is_local(url) else self.size_bytes
        data = storage.read_start(url, LARGEST_IMAGE_BYTES + 1) if (size or 0) <= LARGEST_IMAGE_BYTES else None
        if data is None or len(data) > LARGEST_IMAGE_BYTES:
            why = f"it has more than {LARGEST_IMAGE_BYTES} bytes"
            raise RefusedError("image", f"must have at most {LARGEST_IMAGE_BYTES} bytes", url, why)
        return data


@dataclass(frozen=True)
class Sources:
    """All images of an ingest, in an order that depends on nothing but them."""

    root: str
    """The folder that was listed, or that a list's relative paths start from."""
    classes: tuple[str, ...]
    """Names of the labels; empty where they have none."""
    images: Sequence[Source]
    skipped_files: tuple[str, ...] = ()
    """Files of the folder whose names are not those of images."""
    beside_classes: tuple[str, ...] = ()
    """Images that lie beside the class folders, for whose sake no image has a label."""


@dataclass(frozen=True)
class Tar:
    """A tar whose images are not known yet."""

    path: Listed
    size_bytes: int


@dataclass(frozen=True)
class Tars:
    """Tars to scan, sorted by path."""

    root: str
    tars: tuple[Tar, ...]
    skipped_files: tuple[str, ...] = ()
    """Packed archives in the folder."""


def address(url: str) -> str:
    """A URL without its query, which addresses of web servers alone have."""
    return url.partition("?")[0] if url.lower().startswith(("http://", "https://")) else url


def parted(url: str) -> tuple[str, str]:
    """Folder and name of what lies at a URL; the query of an http address, slashes and all, belongs to the name."""
    folder, _, name = address(url).rpartition("/")
    return folder, name + url.removeprefix(address(url))


def suffix(name: str) -> str:
    """The suffix of a file's name, in lower case."""
    return PurePosixPath(name).suffix.lower()
