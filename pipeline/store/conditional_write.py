"""Writes that happen only if nothing, or exactly what is expected, lies there: of several at once one succeeds.

Leases and commits rest on them. S3 has If-None-Match and If-Match, Google's store generations, Azure's ETags; a local
file gets its name once it is whole, if nothing has that name, and is replaced under a lock on its folder. Stores that
can only look and then write are refused: between the two another process may have written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.access import faults
from pipeline.access.urls import AZURE, GOOGLE, LOCAL, S3, protocol_of
from pipeline.errors import StorageError
from pipeline.host.local_files import write_new
from pipeline.store.ranged_read import fsspec_read

_CONDITIONAL = (*LOCAL, "memory", *S3, *GOOGLE, *AZURE)
_BOUNDARY = "b1dfb4d5c6f04f9aa5a0e6c1"
_memory = threading.Lock()  # its objects are this process's own


def refuse_unconditional(url: str) -> None:
    """Refuse a store without conditional writes.

    Raises:
        StorageError: It is one.
    """
    protocol = protocol_of(url)
    if protocol not in _CONDITIONAL:
        rule = f"must be on a store with conditional writes, which {protocol}:// does not have"
        remedy = "take s3://, gs://, az:// or a folder; from there it can be copied"
        raise StorageError("URL", rule, url, remedy)


def create(filesystem: Any, protocol: str, path: str, data: bytes) -> bool:
    """Put `data` there if nothing is there yet; whether it lies there now, by this call or one whose answer got lost.

    Args:
        filesystem: fsspec's, of the protocol.
        protocol: One that `refuse_unconditional` lets through.
        path: In the file system.
        data: What to put there.

    Raises:
        Exception: What the file system raises for anything but an object that is there already.
    """
    try:
        if protocol in LOCAL:
            write_new(Path(path), data)
        else:
            with _memory if protocol == "memory" else contextlib.nullcontext():
                filesystem.pipe_file(path, data, mode="create")
    except Exception as error:
        if not _is_unmet(error):
            raise
        return bool(fsspec_read(filesystem, path, 0, None) == data)
    return True


def replace(filesystem: Any, protocol: str, path: str, data: bytes, expected: bytes) -> bool:
    """Put `data` there if `expected` lies there; whether `data` lies there now.

    Not for local files, whose writing is `Storage`'s; they have `locked`. Arguments and errors are those of `create`.
    """
    with _memory if protocol == "memory" else contextlib.nullcontext():
        info = filesystem.info(path)  # the version first: what is read after it may be newer, and is then not replaced
        found = fsspec_read(filesystem, path, 0, None)
        if found != expected:
            return bool(found == data)  # an attempt whose answer got lost may have been ours
        try:
            _put_over(filesystem, protocol, path, data, info)
        except Exception as error:
            if not _is_unmet(error):
                raise
            return bool(fsspec_read(filesystem, path, 0, None) == data)
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that replaces files in a local folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _put_over(filesystem: Any, protocol: str, path: str, data: bytes, info: dict[str, Any]) -> None:
    if protocol in S3:
        filesystem.pipe_file(path, data, IfMatch=info["ETag"])
    elif protocol in GOOGLE:  # gcsfs has no such argument
        bucket, key, _ = filesystem.split_path(path)
        filesystem.call(
            "POST",
            f"{filesystem._location}/upload/storage/v1/b/{quote(bucket, safe='')}/o",
            uploadType="multipart",
            ifGenerationMatch=str(info["generation"]),
            headers={"Content-Type": f"multipart/related; boundary={_BOUNDARY}"},
            data=_related(json.dumps({"name": key}).encode(), data),
        )
    elif protocol in AZURE:
        from azure.core import MatchConditions

        filesystem.pipe_file(path, data, etag=info["etag"], match_condition=MatchConditions.IfNotModified)
    else:
        filesystem.pipe_file(path, data)


def _related(metadata: bytes, data: bytes) -> bytes:
    """An object's metadata and content as the two parts of one body."""
    line = b"--" + _BOUNDARY.encode()
    parts = ((b"application/json; charset=UTF-8", metadata), (b"application/octet-stream", data))
    body = b"".join(b"%s\r\nContent-Type: %s\r\n\r\n%s\r\n" % (line, kind, part) for kind, part in parts)
    return body + line + b"--"


def _is_unmet(error: Exception) -> bool:
    """Whether a store answered that something lies there, or something else than was expected."""
    return isinstance(error, FileExistsError) or faults.is_precondition(error)
