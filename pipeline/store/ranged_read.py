"""One range of one object on S3 or behind a web server, put together from as many answers as it takes.

A body that breaks off is resumed where it ended, by a request for the rest alone, under the same ETag: what was
received is not asked for again, and never completed from another version of the object.
"""

from __future__ import annotations

import errno
from typing import Any

from fsspec.asyn import sync

from pipeline.access import faults
from pipeline.errors import ReplacedError, StorageError

CHUNK_BYTES = 1 << 20

_PARTIAL = 206
_BEHIND_THE_END = 416


def fsspec_read(filesystem: Any, path: str, start: int, end: int | None) -> bytes:
    """A range as fsspec reads it: in one piece, of whichever version lies there; empty behind the end."""
    try:
        return bytes(filesystem.cat_file(path, start=start, end=end))
    except Exception as error:
        if faults.is_behind_the_end(error):
            return b""
        raise


class RangedRead:
    """A range of an S3 object that is being read; each attempt resumes where the one before broke off.

    Used by one thread.
    """

    def __init__(self, start: int, length: int | None, etag: str | None) -> None:
        """Decide what to read; does no I/O.

        Args:
            start: First byte in the object.
            length: Bytes to read; fewer come where the object ends before that. None: all; not for the web.
            etag: The version that is meant, with the store's quotes; None: whichever answers first.
        """
        self._start = start
        self._length = length
        self._etag = etag
        self._parts: list[bytes] = []  # joined once: a buffer that grows copies what it has again and again
        self._received_bytes = 0

    def attempt(self, filesystem: Any, path: str) -> bytes:
        """Read what is still missing; raises what s3fs, botocore and aiohttp raise.

        Args:
            filesystem: An `s3fs.S3FileSystem`; of an `HttpRangedRead` an `HTTPFileSystem`.
            path: Bucket and key, or an address.
        """
        if not self._is_whole:
            try:
                is_fetched = self._fetch(filesystem, path)
                if not (is_fetched or self._is_whole):
                    sync(filesystem.loop, self._stream, filesystem, path)
            except OSError as error:
                if not faults.is_behind_the_end(error):
                    raise
        return b"".join(self._parts)[: self._length]

    @property
    def _is_whole(self) -> bool:
        return self._length is not None and self._received_bytes >= self._length

    @property
    def _first(self) -> int:
        return self._start + self._received_bytes

    @property
    def _end(self) -> int | None:
        return None if self._length is None else self._start + self._length

    @property
    def _range(self) -> str:
        return f"bytes={self._first}-{'' if self._end is None else self._end - 1}"

    def _fetch(self, filesystem: Any, path: str) -> bool:
        bodies = getattr(filesystem, "bodies", None)
        return bodies is not None and bodies.fetch(
            filesystem, path, (self._first, self._end), etag=self._etag, begin=self._begin, take=self._take
        )

    async def _stream(self, filesystem: Any, path: str) -> None:
        bucket, key, _ = filesystem.split_path(path)
        first = self._first
        condition = {"IfMatch": self._etag} if self._etag else {}
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=self._range, **condition)
        body = answer["Body"]
        try:
            if first and "ContentRange" not in answer:
                raise OSError(errno.EPROTO, "the store sent a whole object where a range was asked for")
            self._begin(answer.get("ETag"))
            while chunk := await body.read(CHUNK_BYTES):
                self._take(chunk)
        finally:
            body.close()

    def _begin(self, etag: str | None) -> None:
        self._etag = self._etag or etag

    def _take(self, chunk: bytes) -> None:
        self._parts.append(chunk)
        self._received_bytes += len(chunk)


class HttpRangedRead(RangedRead):
    """A range of what lies behind an http address that is being read."""

    async def _stream(self, filesystem: Any, path: str) -> None:
        assert self._length is not None
        first = self._first
        headers = {"Range": self._range, "Accept-Encoding": "identity"}
        if self._etag and not self._etag.startswith("W/"):  # a weak one never matches: RFC 9110, section 13.1.1
            headers["If-Match"] = self._etag
        session = await filesystem.set_session()
        async with session.get(filesystem.encode_url(path), headers=headers) as answer:
            if answer.status == _BEHIND_THE_END:
                return
            filesystem._raise_not_found_for_status(answer, path)
            if first and answer.status != _PARTIAL:
                remedy = "read it from a server that answers Range, or copy it to a folder or S3 first"
                raise StorageError("web server", "must answer ranged requests", path, remedy)
            found = answer.headers.get("ETag")
            if self._etag and found != self._etag:  # servers that do not know If-Match
                raise ReplacedError("object", f"must have the ETag {self._etag}", path, "restore the object")
            self._etag = found
            async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                self._take(chunk)
                if self._received_bytes >= self._length:
                    return
