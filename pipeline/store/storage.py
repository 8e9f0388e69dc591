"""Files and objects by URL: one picklable value that reads, writes and lists, and outlives a storage restart.

Everything goes through fsspec, so ``s3://``, ``gs://``, ``memory://``, ``file://`` and plain paths behave alike. Local
files are written here, because only a temporary file and a rename make that atomic.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.access.retry import retry
from pipeline.access.store_access import StoreAccess
from pipeline.access.throttle import Throttle
from pipeline.access.urls import HTTP, S3, is_folder_mark, is_local, is_s3, is_web, path_of, protocol_of
from pipeline.errors import StorageError
from pipeline.host.local_files import local_files, read_part, write_whole
from pipeline.store import conditional_write, file_systems
from pipeline.store.ranged_read import HttpRangedRead, RangedRead, fsspec_read
from pipeline.store.s3_filesystem import MAX_CONNECTIONS

T = TypeVar("T")

CHECK_SECONDS = 3.0
DELETES_AT_ONCE = 32
PROBE_BYTES = 65536
_RANGED = dict.fromkeys(S3, RangedRead) | dict.fromkeys(HTTP, HttpRangedRead)


@dataclass(frozen=True)
class Storage(StoreAccess):
    """Files and objects by URL; an argument, so that secrets stay out of logs and of Ray's runtime environment.

    Every method raises FileNotFoundError where nothing lies at the URL, StorageError for what the user can fix
    (unreachable, credentials, missing bucket, full disk) and OSError naming the URL for the rest. Transient faults, and
    credentials that are missing or refused, are retried with backoff until `retry_seconds` have passed. Methods block
    and are safe to call from several threads.
    """

    @staticmethod
    def join(url: str, *parts: str) -> str:
        """``join("s3://bucket/data/", "a", "b")`` is ``s3://bucket/data/a/b``."""
        return "/".join([url.rstrip("/"), *parts])

    @staticmethod
    def local_path(url: str) -> str:
        """The path of a URL for which `is_local` holds."""
        return path_of(url)

    def read(self, url: str) -> bytes:
        """All bytes of a file or object."""
        if is_local(url):
            return self.attempt(url, lambda _, path: read_part(path, 0, None))
        if is_s3(url):
            return self.attempt(url, RangedRead(0, None, None).attempt)
        return self.attempt(url, lambda fs, path: fsspec_read(fs, path, 0, None))

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        """`length` bytes from `offset`; fewer where the object ends before that.

        Args:
            url: What to read.
            offset: First byte.
            length: Bytes.
            etag: The version that is meant, as etag() gave it; None: whatever lies there. Only S3 and web servers
                check it.

        Raises:
            ReplacedError: The object has another ETag by now.
        """
        if is_local(url):
            return self.attempt(url, lambda _, path: read_part(path, offset, length))
        if length > 0 and (kind := _RANGED.get(protocol_of(url))):
            return self.attempt(url, kind(offset, length, etag).attempt)
        return self.attempt(url, lambda fs, path: fsspec_read(fs, path, offset, offset + length))

    def read_start(self, url: str, length: int) -> bytes:
        """The first `length` bytes; fewer where there are no more. Also of web servers that know no ranges."""
        if is_web(url):  # each attempt starts over
            return self.attempt(url, lambda fs, path: HttpRangedRead(0, length, None).attempt(fs, path))
        return self.read_range(url, 0, length)

    def write(self, url: str, data: bytes) -> None:
        """Put `data` there whole or not at all, replacing what was there."""
        if is_local(url):
            self._put_local(url, lambda temporary: temporary.write_bytes(data))
        else:
            self.attempt(url, lambda fs, path: fs.pipe_file(path, data))

    def create(self, url: str, data: bytes) -> bool:
        """Put `data` there if nothing is there yet; of several at once only one gets True.

        Raises:
            StorageError: Also of a store that has no conditional writes (pipeline.store.conditional_write).
        """
        conditional_write.refuse_unconditional(url)
        return self.attempt(url, lambda fs, path: conditional_write.create(fs, protocol_of(url), path, data))

    def replace(self, url: str, data: bytes, expected: bytes) -> bool:
        """Put `data` there if exactly `expected` lies there; of several at once only one gets True.

        Raises:
            StorageError: Also of a store that has no conditional writes.
        """
        conditional_write.refuse_unconditional(url)
        if is_local(url):
            with conditional_write.locked(Path(path_of(url)).parent):
                found = self.read(url)
                if found == expected:
                    self.write(url, data)
            return found in (expected, data)
        return self.attempt(url, lambda fs, path: conditional_write.replace(fs, protocol_of(url), path, data, expected))

    def upload(self, local_path: Path, url: str) -> None:
        """Copy a local file there, whole or not at all."""
        if is_local(url):
            self._put_local(url, lambda temporary: shutil.copyfile(local_path, temporary))
        else:
            self.attempt(url, lambda fs, path: fs.put_file(str(local_path), path))

    def download(self, url: str, local_path: Path) -> None:
        """Copy a file or object to a local path, whole or not at all."""
        self._put_local(
            str(local_path), lambda temporary: self.attempt(url, lambda fs, path: fs.get_file(path, str(temporary)))
        )

    def attempt(self, url: str, call: Callable[[Any, str], T]) -> T:
        """Run `call(filesystem, path)` with the retries and errors of every other method; it must be safe to repeat."""
        used: Any = None

        def once() -> T:
            nonlocal used
            used = file_systems.file_system(self, url)
            return call(used, path_of(url))

        return retry(
            once,
            url,
            self.retry_seconds,
            throttle=None if is_local(url) else _throttle(self.endpoint_url, protocol_of(url), os.getpid()),
            renew=lambda: file_systems.renew(self, url, used),
            origins=dict(self.origins) if is_s3(url) else {},
        )

    def exists(self, url: str) -> bool:
        """Whether a file or object (not a folder or prefix) lies there."""
        try:
            return bool(self.attempt(url, _is_file))
        except FileNotFoundError:
            return False

    def size(self, url: str) -> int:
        """Bytes of a file or object."""
        size = self.attempt(url, lambda fs, path: fs.info(path)["size"])
        return len(self.read(url)) if size is None else int(size)  # some web servers do not say

    def etag(self, url: str) -> str | None:
        """The store's name for this version of an object, quotes included; None where it has none."""
        info = self.attempt(url, lambda fs, path: fs.info(path))
        return info.get("ETag") or info.get("etag") or None

    def list_names(self, url: str) -> list[str]:
        """Sorted names of the files and folders directly under `url`; empty where there is no such folder.

        Objects that stand for folders do not count (pipeline.access.urls).
        """
        try:
            if is_local(url):
                return sorted(self.attempt(url, lambda _, path: [item.name for item in Path(path).iterdir()]))
            found = self.attempt(url, lambda fs, path: fs.ls(path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        root = path_of(url).rstrip("/")
        named = [(info["name"].rstrip("/"), info.get("size")) for info in found]
        paths = {path for path, size in named if path != root and (size or not is_folder_mark(path))}
        return sorted({path.rpartition("/")[2] for path in paths})

    def list_files(self, url: str) -> dict[str, int]:
        """Size in bytes of every file under `url` at any depth, by its path relative to `url`, sorted.

        Links to local folders are followed. A link to nowhere counts as a file of no bytes; pipes, sockets and devices
        do not count, nor do objects that stand for folders (pipeline.access.urls).
        """
        if is_local(url):
            return self.attempt(url, lambda _, path: dict(sorted(local_files(path))))
        found = self.attempt(url, lambda fs, path: fs.find(path, detail=True))
        root = path_of(url).rstrip("/") + "/"
        sizes = ((path, int(info["size"] or 0)) for path, info in sorted(found.items()) if path.startswith(root))
        return {path.removeprefix(root): size for path, size in sizes if size or not is_folder_mark(path)}

    def delete(self, url: str) -> None:
        """Remove a file or object; that it is already gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.attempt(url, lambda fs, path: fs.rm_file(path))

    def delete_all(self, urls: Iterable[str]) -> None:
        """Remove files or objects as `delete`, several at once: a request each, which every store knows.

        Raises the first failure, once all others are deleted.
        """
        with ThreadPoolExecutor(DELETES_AT_ONCE) as threads:
            deletes = [threads.submit(self.delete, url) for url in urls]
        for delete in deletes:
            delete.result()

    def check(
        self, url: str, *, write: bool, shared: bool = False, exclusive: bool = False, is_patient: bool = False
    ) -> None:
        """Fail within seconds if work on `url` cannot succeed.

        Args:
            url: A folder or prefix that will be read, and need not exist yet if it will be written.
            write: Also put a small object under `url` and remove it again.
            shared: Other processes will work on it too.
            exclusive: Only one process at a time shall work on it.
            is_patient: Wait for an unreachable store as every other method does.

        Raises:
            StorageError: Unknown protocol, missing package, unreachable, refused credentials, missing bucket,
                unwritable folder, full disk, no conditional writes.
        """
        if shared and protocol_of(url) == "memory":
            raise StorageError("URL", "must be one that every process sees", url, "take s3:// or a folder")
        if write and protocol_of(url) in HTTP:
            raise StorageError("URL", "must be one that can be written", url, "take s3:// or a folder")
        if exclusive:
            conditional_write.refuse_unconditional(url)
        hasty = replace(self, retry_seconds=min(CHECK_SECONDS, self.retry_seconds))
        try:
            (self if is_patient else hasty).probe(url, write=write)
        except FileNotFoundError as error:
            endpoint = dict(self.origins).get("endpoint", "AWS_ENDPOINT_URL")
            remedy = "take a folder that can be made" if is_local(url) else f"check the bucket and {endpoint}"
            raise StorageError("storage", "must accept this URL", url, remedy) from error

    def probe(self, url: str, *, write: bool) -> None:
        """Look whether a store answers, and takes what is written, as `check` does; raises what its client raises."""
        file_systems.file_system(self, url)
        if protocol_of(url) in S3:
            # HEAD answers carry no reason; a listing of one says which of key, secret and bucket is wrong.
            self.attempt(url, _list_one)
        elif not is_local(url):
            self.exists(url)
        if write:
            probe = self.join(url, f".write-check-{os.getpid()}-{os.urandom(4).hex()}")
            self.write(probe, bytes(PROBE_BYTES))
            self.delete(probe)

    def _put_local(self, url: str, fill: Callable[[Path], object]) -> None:
        retry(lambda: write_whole(Path(path_of(url)), fill), url, self.retry_seconds)


@functools.lru_cache(maxsize=16)
def _throttle(endpoint_url: str | None, protocol: str, process_id: int) -> Throttle:  # noqa: ARG001
    """One for each store and process."""
    return Throttle(MAX_CONNECTIONS)


def _is_file(filesystem: Any, path: str) -> bool:
    try:
        return bool(filesystem.info(path)["type"] == "file")
    except NotADirectoryError:  # nothing can lie below a file
        return False


def _list_one(filesystem: Any, path: str) -> None:
    bucket, key, _ = filesystem.split_path(path)
    if not bucket:
        raise StorageError("URL", "must name a bucket", "s3://", "write s3://bucket/folder")
    filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
