"""Headers of a tar of unknown origin, read by `tarfile` within bounds that hold whatever they say."""

from __future__ import annotations

import tarfile
from typing import Any, Self

from pipeline.errors import clipped

LARGEST_HEADER_BYTES = 1 << 20
"""Of what pax and GNU put before a member (names, times, comments); `tarfile` reads it into memory whole."""
MOST_EXTENDED_HEADERS = 8
"""Before one member. Writers put at most four there: global and local pax, a long name and a long link."""
LARGEST_NAME_BYTES = 1024
"""Of a member that is used. The rows of an index are as wide as its longest name."""
LARGEST_SIZE = 2**63 - 1

_BLOCK = tarfile.BLOCKSIZE
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_PAX_SIZES = frozenset({b"size", b"GNU.sparse.size", b"GNU.sparse.realsize"})
_PAX_USED = _PAX_SIZES | {
    b"path",
    b"linkpath",
    b"GNU.sparse.name",
    b"GNU.sparse.map",
    b"GNU.sparse.major",
    b"GNU.sparse.minor",
}
"""Keys of pax records; others (times, owners, comments, hdrcharset) change nothing that is read of a member here."""
_LENGTH_DIGITS = 20


class BoundedTar(tarfile.TarFile):
    """A tar, with what `BoundedInfo` keeps between headers."""

    extended_headers = 0
    """Read since the last member."""


class BoundedInfo(tarfile.TarInfo):
    """Headers of bounded sizes and numbers.

    Pax headers and maps of sparse files are read here: `tarfile` takes time and memory that grow with the square of
    their length (CVE-2024-6232), and steps back without end where a size is negative (CVE-2025-8194).
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """A header from its block."""
        info = super().frombuf(buf, encoding, errors)
        if not 0 <= info.size <= LARGEST_SIZE:
            raise tarfile.HeaderError(f"a size of {info.size} bytes")
        if info.type in _EXTENDED and info.size > LARGEST_HEADER_BYTES:
            raise tarfile.HeaderError(f"an extended header of {info.size} bytes, more than {LARGEST_HEADER_BYTES}")
        return info

    # `tarfile` calls what follows, each with the archive; typeshed does not know of it.

    def _proc_member(self, tar: Any) -> Any:
        tar.extended_headers = tar.extended_headers + 1 if self.type in _EXTENDED else 0
        if tar.extended_headers > MOST_EXTENDED_HEADERS:
            raise tarfile.HeaderError(f"more than {MOST_EXTENDED_HEADERS} extended headers before one member")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_sparse(self, tar: Any) -> Any:
        """An old GNU sparse file: its map continues in blocks before the content, and is skipped."""
        info: Any = self
        _, has_more, size = info._sparse_structs
        while has_more:
            block = tar.fileobj.read(_BLOCK)
            if len(block) < _BLOCK:
                raise tarfile.HeaderError("the map of a sparse file is cut off")
            has_more = block[504]
        info.offset_data = tar.fileobj.tell()
        tar.offset = info.offset_data + info._block(info.size)
        info.size, info.sparse = size, []
        return info

    def _proc_pax(self, tar: Any) -> Any:
        info: Any = self
        is_global = info.type == tarfile.XGLTYPE
        data = tar.fileobj.read(info._block(info.size))[: info.size]
        if len(data) < info.size:
            raise tarfile.HeaderError("empty header")  # what `tarfile` says of the member that is not there either
        records = _pax_records(data)
        if is_global and any(len(value) > LARGEST_NAME_BYTES for value in records.values()):
            # It would be looked at again with every member.
            raise tarfile.HeaderError(f"a global pax header with a name of more than {LARGEST_NAME_BYTES} bytes")
        headers = tar.pax_headers if is_global else tar.pax_headers.copy()
        headers |= records
        try:
            member: Any = info.fromtarfile(tar)
        except tarfile.HeaderError as error:
            raise tarfile.HeaderError(str(error)) from None  # of the subclasses some mean the end of an archive
        if _are_sparse(headers):
            member.sparse = []  # its map lies before its content, and is skipped with it
        if not is_global:
            member._apply_pax_info(headers, tar.encoding, tar.errors)
            member.offset = info.offset
            if "size" in headers:
                has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                tar.offset = member.offset_data + (member._block(member.size) if has_content else 0)
        return member


def _pax_records(data: bytes) -> dict[str, str]:
    r"""The records of a pax header that matter here, each `LENGTH KEY=VALUE\n`."""
    records = {}
    start = 0
    while start < len(data) and data[start]:  # some writers fill up with NUL
        space = data.find(b" ", start, start + _LENGTH_DIGITS + 1)
        digits = data[start : max(start, space)]
        end = start + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : max(0, end - 1)].partition(b"=")
        if not (key and equals) or end > len(data) or data[end - 1] != ord("\n"):
            raise tarfile.HeaderError(f"a pax record that is none: {clipped(repr(data[start : start + 40]))}")
        if key in _PAX_SIZES and not (value.isdigit() and len(value) <= _LENGTH_DIGITS and int(value) <= LARGEST_SIZE):
            raise tarfile.HeaderError(f"a pax {key.decode()} of {clipped(value.decode(errors='replace'))} bytes")
        if key in _PAX_USED:
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        start = end
    return records


def _are_sparse(headers: dict[str, str]) -> bool:
    """Whether pax headers are those of a sparse file, in any of GNU tar's three versions."""
    is_newest = (headers.get("GNU.sparse.major"), headers.get("GNU.sparse.minor")) == ("1", "0")
    return is_newest or "GNU.sparse.map" in headers or "GNU.sparse.size" in headers
