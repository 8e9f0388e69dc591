"""Uploads of images from this machine's disk to object storage, for an ingest that runs elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.terminal import bytes_text, progress_bar, say
from pipeline.access.urls import is_local
from pipeline.errors import SourceError
from pipeline.host.local_files import local_files
from pipeline.store.storage import Storage

THREADS = 16


@dataclass(frozen=True)
class Upload:
    """The result of an upload."""

    url: str
    """Where the source is now: the folder, or the single file."""
    files: int
    kept: int
    """Files that were already there, of the same size and no older."""
    bytes: int
    """Size of the files that were sent."""


def upload_and_say(storage: Storage, source: str, url: str) -> str:
    """Copy a folder or a tar to object storage, and print what was copied; returns where it is now.

    Raises:
        UserError: There is no such source, or the URL cannot be written.
    """
    with progress_bar("upload") as show:
        done = upload(storage, source, url, lambda number, total, size: show(number, total, bytes_text(size)))
    kept = f", {done.kept} were already there" if done.kept else ""
    say(f"{done.url}: {done.files} files ({bytes_text(done.bytes)} sent{kept})")
    return done.url


def upload(storage: Storage, source: str, url: str, on_progress: Callable[[int, int, int], None]) -> Upload:
    """Copy a folder or a tar under a URL. The same call again sends what is missing, changed or newer.

    Args:
        storage: Reaches the URL.
        source: A folder of this machine, with all below it, or one tar.
        url: Folder or prefix.
        on_progress: Called with the files done, the total, and the bytes sent.

    Raises:
        SourceError: There is no such source on this machine.
        StorageError: The URL cannot be written.
    """
    path = Path(Storage.local_path(source)) if is_local(source) else None
    if path is None or not (path.is_dir() or (path.is_file() and path.suffix == ".tar")):
        rule, remedy = "must be a folder or a tar on this machine", "omit --upload, or copy the files yourself"
        raise SourceError("source", rule, source, remedy)
    if is_local(url):
        raise SourceError("--upload", "must be the URL of a store", url, "use s3://bucket/folder")
    storage.check(url, write=True)
    files = dict(local_files(str(path))) if path.is_dir() else {path.name: path.stat().st_size}
    root = path if path.is_dir() else path.parent
    there = written_at(storage, url)
    missing = {name: size for name, size in files.items() if not _is_there(root / name, size, there.get(name))}
    sent, number = 0, len(files) - len(missing)
    on_progress(number, len(files), sent)
    for size in _sent(storage, root, url, missing):
        sent, number = sent + size, number + 1
        on_progress(number, len(files), sent)
    return Upload(url if path.is_dir() else Storage.join(url, path.name), len(files), len(files) - len(missing), sent)


def written_at(storage: Storage, url: str) -> dict[str, tuple[int, float]]:
    """Size in bytes of each object under a URL, and the Unix time at which it was written; 0 if that is unknown."""

    def find(filesystem: Any, path: str) -> dict[str, tuple[int, float]]:
        root = path.rstrip("/") + "/"
        return {
            name.removeprefix(root): (
                int(info["size"] or 0),
                at.timestamp() if (at := info.get("LastModified")) else 0.0,
            )
            for name, info in filesystem.find(path, detail=True).items()
        }

    return storage.attempt(url, find)


def _is_there(path: Path, size: int, found: tuple[int, float] | None) -> bool:
    """Whether the object is this file: of the same size, and written after it."""
    return found is not None and found[0] == size and path.stat().st_mtime <= found[1]


def _sent(storage: Storage, root: Path, url: str, files: dict[str, int]) -> Iterator[int]:
    """Send files; yields the size of each as it arrives."""
    with ThreadPoolExecutor(THREADS) as threads:
        under_way = {
            threads.submit(storage.upload, root / name, Storage.join(url, name)): size for name, size in files.items()
        }
        try:
            for done in as_completed(under_way):
                done.result()
                yield under_way[done]
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
