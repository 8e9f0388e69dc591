"""The photographs that a user points at: a folder of images, or a folder of class folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import SourceError
from pipeline.storage import Storage

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Source:
    """One image file as it was listed."""

    path: str
    """Relative to the folder that was searched."""
    size_bytes: int
    label: int | None
    """Index of the class folder among the sorted class folders; None in a flat folder."""


@dataclass(frozen=True)
class Sources:
    """All images under one folder, sorted by path."""

    root: str
    classes: tuple[str, ...]
    images: tuple[Source, ...]


def find_sources(storage: Storage, root: str) -> Sources:
    """List the images under a folder, by extension and without opening them.

    A class is the first folder on an image's way down. Where an image lies directly under `root`, nothing has a label.

    Args:
        storage: Reaches `root`.
        root: URL or local path.

    Raises:
        SourceError: The folder is missing, empty, or has no image.
        StorageError: The folder cannot be reached.
    """
    root = Storage.absolute(root)
    try:
        sizes = storage.list_files(root)
    except FileNotFoundError:
        sizes = {}
    if not sizes:
        raise SourceError("source", "must be a folder with images", root, "it is missing or empty; check the path")
    # Names with a leading dot are what systems leave behind (.DS_Store, ._photo.jpg of macOS archives).
    paths = [path for path in sizes if _suffix(path) in IMAGE_SUFFIXES and not path.rpartition("/")[2].startswith(".")]
    if not paths:
        seen = ", ".join(list(sizes)[:3]) + (", ..." if len(sizes) > 3 else "")
        wanted = ", ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
        remedy = f"its {len(sizes)} files are {seen}; wanted are {wanted}"
        raise SourceError("source", "must have at least one image", root, remedy)
    folders = {path.partition("/")[0] for path in paths}
    classes = tuple(sorted(folders)) if all("/" in path for path in paths) else ()
    labels = {name: index for index, name in enumerate(classes)}
    images = tuple(Source(path, sizes[path], labels.get(path.partition("/")[0])) for path in sorted(paths))
    return Sources(root, classes, images)


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()
