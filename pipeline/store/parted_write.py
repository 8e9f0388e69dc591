"""One object that several processes write together, each its parts, invisible until all are there.

On S3 this is a multipart upload, on a local path a hidden file beside the target and a rename. On other stores
an object has one writer: `write_stream`. Another process can resume what was begun (pipeline.store.parted_journal).
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from pipeline.access import faults
from pipeline.access.urls import is_local, is_s3
from pipeline.store.storage import Storage

MOST_PARTS = 10_000
"""S3's limit for one object."""
LEAST_PART_BYTES = 5 << 20
"""S3's limit for all parts but the last."""


@dataclass(frozen=True)
class PartedWrite:
    """An object that is being written. A picklable value: any process may write parts of it."""

    url: str
    token: str
    """S3's upload id; in a folder what the hidden file is named after."""

    def __post_init__(self) -> None:
        if is_local(self.url) and not self.token.isalnum():
            raise ValueError(f"no name of a hidden file: {self.token!r}")


@dataclass(frozen=True)
class WrittenPart:
    """A part as it was sent, and what the store answered for it."""

    number: int
    """From 1 on."""
    offset: int
    bytes: int
    crc32c: int
    etag: str = ""

    def __post_init__(self) -> None:
        # They are read back from a journal, which may be damaged.
        counts = (self.number, self.offset, self.bytes, self.crc32c)
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts) or not isinstance(self.etag, str):
            raise ValueError(f"no part: {self}")


def takes_parts(url: str) -> bool:
    """Whether several processes can write one object there."""
    return is_local(url) or is_s3(url)


def begin(storage: Storage, url: str) -> PartedWrite:
    """Start writing. What was begun before for the same target and never finished is deleted.

    The caller must hold the lease on the target: two writers would delete each other's parts.
    """
    abandon_all(storage, url)
    if is_local(url):
        path = Path(Storage.local_path(url))
        path.parent.mkdir(parents=True, exist_ok=True)
        return PartedWrite(url, uuid.uuid4().hex)
    answer = storage.attempt(url, lambda fs, path: _s3(fs, path, "create_multipart_upload"))
    return PartedWrite(url, answer["UploadId"])


def write_part(storage: Storage, target: PartedWrite, number: int, offset: int, data: bytes) -> WrittenPart:
    """Write one part; safe to repeat.

    Args:
        storage: Reaches the target.
        target: From `begin`.
        number: From 1 on, ascending with the offset.
        offset: Of the part's first byte in the object.
        data: At least LEAST_PART_BYTES, but for the last part.
    """
    crc32c = google_crc32c.value(data)
    if is_local(target.url):
        storage.attempt(target.url, lambda *_: _write_at(_hidden(target), offset, data))
        return WrittenPart(number, offset, len(data), crc32c)
    answer = storage.attempt(
        target.url,
        lambda fs, path: _s3(fs, path, "upload_part", UploadId=target.token, PartNumber=number, Body=data),
    )
    return WrittenPart(number, offset, len(data), crc32c, answer["ETag"])


def still_there(storage: Storage, target: PartedWrite, parts: Iterable[WrittenPart]) -> list[WrittenPart]:
    """Those of `parts` that the store still holds as they were written.

    S3 reports each part's size and ETag, which are compared; in a folder the bytes are read, and their CRC32C compared.
    """
    if is_local(target.url):
        return storage.attempt(target.url, lambda *_: [part for part in parts if _is_written(_hidden(target), part)])
    try:
        held = storage.attempt(target.url, lambda fs, path: dict(_held(fs, path, target.token)))
    except FileNotFoundError:  # the upload was finished or aborted
        return []
    return [part for part in parts if held.get(part.number) == (part.bytes, part.etag.strip('"'))]


def finish(storage: Storage, target: PartedWrite, parts: Sequence[WrittenPart]) -> None:
    """Make the object visible, whole; it replaces what was there."""
    if is_local(target.url):
        storage.attempt(target.url, lambda *_: _rename(target))
        return
    numbered = [{"PartNumber": part.number, "ETag": part.etag} for part in sorted(parts, key=lambda part: part.number)]
    lost_answer = False

    def complete(filesystem: Any, path: str) -> None:
        nonlocal lost_answer
        try:
            _s3(
                filesystem,
                path,
                "complete_multipart_upload",
                UploadId=target.token,
                MultipartUpload={"Parts": numbered},
            )
        except Exception as error:
            if not (lost_answer and faults.http_code(error) == "NoSuchUpload"):
                lost_answer = True
                raise

    storage.attempt(target.url, complete)


def abandon_all(storage: Storage, url: str, but: PartedWrite | None = None) -> None:
    """Delete what was begun for this target and never finished, except `but`; it is invisible, and takes space."""
    if is_local(url):
        target = Path(Storage.local_path(url))
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.parts"):
            if but is None or leftover != _hidden(but):
                leftover.unlink(missing_ok=True)
    elif is_s3(url):
        for upload_id in storage.attempt(url, _open_uploads):
            if but is None or upload_id != but.token:
                abort = functools.partial(_s3, method="abort_multipart_upload", UploadId=upload_id)
                with contextlib.suppress(FileNotFoundError):
                    storage.attempt(url, abort)


def write_stream(storage: Storage, url: str, pieces: Callable[[], Iterable[bytes]]) -> None:
    """Write one object piece by piece with fsspec's own writer; it is visible when all is written.

    Args:
        storage: Reaches the target.
        url: On any store; not for a local path, where a half-written file would be seen.
        pieces: Gives the content from its beginning, each time it is called.
    """

    def write(filesystem: Any, path: str) -> None:
        file = filesystem.open(path, "wb")
        try:
            for piece in pieces():
                file.write(piece)
        except BaseException:
            with contextlib.suppress(Exception):
                file.discard()
            with contextlib.suppress(AttributeError):  # else fsspec would finish it when it is collected
                file.closed = True
            raise
        file.close()

    storage.attempt(url, write)


def _s3(filesystem: Any, path: str, method: str, **arguments: Any) -> Any:
    bucket, key, _ = filesystem.split_path(path)
    return filesystem.call_s3(method, Bucket=bucket, Key=key, **arguments)


def _open_uploads(filesystem: Any, path: str) -> list[str]:
    bucket, key, _ = filesystem.split_path(path)
    answer = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
    return [upload["UploadId"] for upload in answer.get("Uploads") or () if upload["Key"] == key]


def _held(filesystem: Any, path: str, upload_id: str) -> Iterator[tuple[int, tuple[int, str]]]:
    """Number, bytes and ETag of each part that an upload holds; a thousand come with an answer."""
    marker = 0
    while True:
        answer = _s3(filesystem, path, "list_parts", UploadId=upload_id, PartNumberMarker=marker)
        found = answer.get("Parts") or ()
        yield from ((part["PartNumber"], (part["Size"], part["ETag"].strip('"'))) for part in found)
        if not answer.get("IsTruncated") or not found:
            return
        marker = found[-1]["PartNumber"]


def _hidden(target: PartedWrite) -> Path:
    path = Path(Storage.local_path(target.url))
    return path.with_name(f".{path.name}.{target.token}.parts")


def _is_written(path: Path, part: WrittenPart) -> bool:
    try:
        with _opened(path, os.O_RDONLY) as file:
            if part.offset + part.bytes > os.fstat(file).st_size:  # before memory is asked for
                return False
            data = os.pread(file, part.bytes, part.offset)
    except FileNotFoundError:
        return False
    return (len(data), google_crc32c.value(data)) == (part.bytes, part.crc32c)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with _opened(path, os.O_WRONLY | os.O_CREAT) as file:
        view = memoryview(data)
        while view:
            written = os.pwrite(file, view, offset)
            view, offset = view[written:], offset + written


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _rename(target: PartedWrite) -> None:
    hidden = _hidden(target)
    with _opened(hidden, os.O_WRONLY) as file:
        os.fsync(file)
    hidden.replace(Storage.local_path(target.url))
