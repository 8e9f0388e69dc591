"""The photographs that a user points at: a folder of images or of class folders, a list of files, or tars."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.access.places import Given, Listed
from pipeline.access.urls import is_web
from pipeline.errors import SourceError
from pipeline.ingest import source_lists, source_tars
from pipeline.ingest.source import IMAGE_SUFFIXES, Source, Sources, Tar, Tars, address, parted, suffix
from pipeline.store.storage import Storage

PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip")


def find_sources(storage: Storage, source: str) -> Sources | Tars:
    """Find images or tars by their names alone; opens nothing but a list of files.

    Args:
        storage: Reaches `source`.
        source: URL or local path of a folder of images or class folders, of a tar or a folder of tars, a pattern of
            tars (`00{000..123}.tar`, `*.tar`), or of a text file that lists images.

    Raises:
        SourceError: It is missing, empty, or holds nothing of these; or a tar's name is no UTF-8.
        StorageError: It cannot be reached.
    """
    place = Given(source).url(str(Path.cwd()))
    found = _found(storage, place if is_web(place) else place.rstrip("/") or "/")
    if isinstance(found, Tars):
        for tar in found.tars:
            _refuse_odd_bytes(tar.path.url(found.root))
    return found


def _refuse_odd_bytes(url: str) -> None:
    """Refuse a name that is no UTF-8: names of tars become those of shards, which a manifest keeps as UTF-8."""
    try:
        url.encode()
    except UnicodeEncodeError:
        raise SourceError("source", "must have a name in UTF-8", url, "rename the tar, or its folder") from None


def _found(storage: Storage, source: str) -> Sources | Tars:
    if address(source).lower().endswith(PACKED_SUFFIXES):
        remedy = "unpack it first: single images cannot be read from a packed archive"
        raise SourceError("source", "must not be compressed", source, remedy)
    if source_tars.is_pattern(source) and not storage.list_names(source):
        return source_tars.matching_tars(storage, source)
    if storage.exists(source):
        if suffix(address(source)) == ".tar":
            root, name = parted(source)
            return Tars(root, (Tar(Listed(name), storage.size(source)),))
        return source_lists.listed_sources(storage, source)
    return _folder(storage, source)


def _folder(storage: Storage, root: str) -> Sources | Tars:
    try:
        sizes = storage.list_files(root)
    except FileNotFoundError:
        sizes = {}
    if not sizes:
        remedy = "it is missing or empty; check the path"
        raise SourceError("source", "must be a folder with images or tars, a tar, or a list of files", root, remedy)
    # Names with a leading dot are what systems leave behind (.DS_Store, ._photo.jpg, .Trash/ and .ipynb_checkpoints/).
    shown = [path for path in sorted(sizes) if not any(map(_is_hidden, path.split("/")))]
    images = [path for path in shown if suffix(path) in IMAGE_SUFFIXES]
    tars = [path for path in shown if suffix(path) == ".tar"]
    if images and tars:
        remedy = f"name the tars with {Storage.join(root, '*.tar')}, or point at the images' own folder"
        raise SourceError("source", "must hold images or tars, not both", root, remedy)
    if tars:
        packed = tuple(path for path in shown if path.lower().endswith(PACKED_SUFFIXES))
        return Tars(root, tuple(Tar(Listed(path), sizes[path]) for path in tars), packed)
    if not images:
        raise _nothing_there(root, list(sizes))
    others = tuple(path for path in shown if suffix(path) not in IMAGE_SUFFIXES)
    return replace(_by_class(root, {path: sizes[path] for path in images}), skipped_files=others)


def _is_hidden(part: str) -> bool:
    """Whether a name is one that people do not see; . and .. in a key are none, and are refused by name."""
    return part.startswith(".") and part not in (".", "..")


def _nothing_there(root: str, names: list[str]) -> SourceError:
    seen = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    wanted = ", ".join(sorted(kind.removeprefix(".") for kind in IMAGE_SUFFIXES))
    remedy = f"its {len(names)} files are {seen}; wanted are tar, {wanted}"
    return SourceError("source", "must have at least one image or tar", root, remedy)


def _by_class(root: str, sizes: dict[str, int]) -> Sources:
    """A class is the first folder on an image's way down; where an image lies directly under `root`, none has one."""
    folders = {_first_folder(path) for path in sizes}
    beside = tuple(path for path in sizes if not _first_folder(path))
    classes = () if beside else tuple(sorted(folders))
    labels = {name: index for index, name in enumerate(classes)}
    images = tuple(Source(Listed(path), size, labels.get(_first_folder(path))) for path, size in sizes.items())
    return Sources(root, classes, images, beside_classes=beside if len(beside) < len(sizes) else ())


def _first_folder(path: str) -> str:
    """The first folder that has a name; empty where there is none."""
    folder, slash, _ = path.lstrip("/").partition("/")
    return folder if slash else ""
