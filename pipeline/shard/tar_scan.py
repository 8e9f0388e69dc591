"""One pass over a tar of unknown origin: its members with their offsets, and every place at which it is damaged.

Members are parsed by `tarfile` (ustar with prefix, pax, GNU long names, base-256 sizes). The pass is hand-written,
since `tarfile` and webdataset take a damaged header in the middle for the end of the archive, and report nothing; here
it is reported, and what follows it is found.

Tars need not be trusted: whatever a header says, time and memory stay in proportion to the bytes that are read.
"""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, NamedTuple, cast

from pipeline.errors import clipped
from pipeline.shard.tar_headers import LARGEST_NAME_BYTES, BoundedInfo, BoundedTar

CHUNK_BYTES = 8 << 20
MOST_FAULTS = 100_000
"""Of one tar; one with more is given up, before their list fills the memory."""
_HELD_CHUNKS = 3
_BLOCK = tarfile.BLOCKSIZE
_MAGIC = slice(257, 262)
_PACKERS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}
"""By the first bytes of what they make."""
_OTHERS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file: get that with `git lfs pull`",
    b"/annex/": "it is a pointer of git-annex, not the file: get that with `git annex get`",
    b"<": "it is a page (HTML or XML), as servers send instead of a file: download it again",
    b"{": "it is JSON, as servers send instead of a file: download it again",
    b"\x89PNG": "it is an image",
    b"\xff\xd8\xff": "it is an image",
}
"""Other files found under the name of a tar, by their first bytes."""
_SNIFFED_BYTES = 64
_NO_END = "the tar is cut off: it has no end mark"


class TarMember(NamedTuple):
    """A file in a tar, or a link."""

    name: str
    offset: int
    """Byte at which its first header begins."""
    data_offset: int
    """Byte at which its content begins."""
    size: int
    obstacle: str = ""
    """Why its content does not lie there in one piece; empty where it does."""


class TarFault(NamedTuple):
    """A place at which a tar is not as a writer leaves it."""

    offset: int
    what: str


class RangedFile(io.RawIOBase):
    """A read-only file over ranged reads, for one pass: reads the next chunk while this one is looked at.

    Holds at most `_HELD_CHUNKS` chunks, whatever the size of the file.
    """

    def __init__(self, read_range: Callable[[int, int], bytes], size: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.size = size
        self._read_range = read_range
        self._chunk_bytes = chunk_bytes
        self._chunks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="tar-scan")
        self._position = 0

    def close(self) -> None:
        """Cancel what is being read ahead."""
        if not self.closed:
            self._reader.shutdown(wait=True, cancel_futures=True)
        super().close()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The byte that is read next."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; reads nothing."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer only at the end of the file."""
        end = self.size if size < 0 else min(self.size, self._position + size)
        pieces = []
        while self._position < end:
            number, within = divmod(self._position, self._chunk_bytes)
            piece = self._chunk(number)[within : within + end - self._position]
            if not piece:  # the object has become shorter since it was asked for its size
                break
            pieces.append(piece)
            self._position += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _chunk(self, number: int) -> bytes:
        for wanted in (number, number + 1):
            start = wanted * self._chunk_bytes
            if wanted not in self._chunks and start < self.size:
                length = min(self._chunk_bytes, self.size - start)
                self._chunks[wanted] = self._reader.submit(self._read_range, start, length)
        self._chunks.move_to_end(number)
        while len(self._chunks) > _HELD_CHUNKS:
            self._chunks.popitem(last=False)
        return self._chunks[number].result()


def scan_tar(file: RangedFile, *, salvage: bool = True) -> Iterator[TarMember | TarFault]:
    """Scan a tar from its first byte to its last.

    Content may be read from `file` between two members. A member whose content ends early is a fault, not a member.

    Args:
        file: The tar.
        salvage: Look for the next good header after a damaged place; else end there.
    """
    offset: int | None = 0
    faults = 0
    while offset is not None:
        fault, offset = yield from _archive(file, offset)
        if fault is None:
            return
        faults += 1
        if faults > MOST_FAULTS:
            yield TarFault(fault.offset, f"more than {MOST_FAULTS} damaged places; the rest was not looked at")
            return
        yield fault
        if not salvage:
            return
        offset = _next_header(file, offset)


def _archive(file: RangedFile, start: int) -> Generator[TarMember, None, tuple[TarFault | None, int]]:
    """The members from `start` to an end mark or a fault; returns the fault, and where to continue."""
    file.seek(start)
    tar: tarfile.TarFile | None = None
    here = start
    try:
        # Names become the same text under every locale; pax headers have UTF-8 anyway, or bytes that are no text.
        tar = BoundedTar(fileobj=cast(IO[bytes], file), errorlevel=2, tarinfo=BoundedInfo, encoding="utf-8")
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            if tar.offset <= here:
                raise tarfile.HeaderError("it leads back to what was read before")
            here = tar.offset
            missing = (tar.offset if member.issparse() else member.offset_data + member.size) - file.size
            if missing > 0 and not member.isdir():
                what = f"{clipped(member.name)} is cut off, {missing} bytes are missing"
                return TarFault(member.offset, what), file.size
            if member.isreg() or member.issym() or member.islnk():
                yield TarMember(member.name, member.offset, member.offset_data, member.size, _obstacle(member))
    except (tarfile.TarError, ValueError, UnicodeError, OverflowError, EOFError) as error:
        if here >= file.size > 0:
            return TarFault(file.size, _NO_END), file.size
        # A good header's extent was read: nothing of it is looked at again, which could repeat for each of its blocks.
        behind = max(file.tell(), here + _BLOCK)
        return TarFault(here, _header_fault(file, here, error)), behind
    return _end_fault(file, tar.offset)


def _obstacle(member: tarfile.TarInfo) -> str:
    if not member.isreg():
        return f"it is a link to {clipped(member.linkname)}"
    if (size := len(member.name.encode("utf-8", "surrogateescape"))) > LARGEST_NAME_BYTES:
        return f"its name has {size} bytes, more than {LARGEST_NAME_BYTES}"
    if "\0" in member.name:
        return "its name has a NUL in it"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the folder that a tar is unpacked in"
    return "it is stored as a sparse file" if member.issparse() else ""


def _header_fault(file: RangedFile, offset: int, error: Exception) -> str:
    return (_other_file(file) if not offset else "") or f"damaged header ({clipped(str(error))})"


def _other_file(file: RangedFile) -> str:
    """The kind of a file that does not begin as a tar; empty where it is unknown."""
    if not file.size:
        return "it is empty: make or download it again"
    file.seek(0)
    start = file.read(_SNIFFED_BYTES)
    if packer := next((name for magic, name in _PACKERS.items() if start.startswith(magic)), None):
        return f"it is compressed by {packer}; unpack it first"
    return next((what for magic, what in _OTHERS.items() if start.lstrip().startswith(magic)), "")


def _end_fault(file: RangedFile, offset: int) -> tuple[TarFault | None, int]:
    """The fault where `tarfile` sees the end of an archive, if there is one."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        return TarFault(min(offset, file.size), _NO_END), file.size
    if any(block):
        return TarFault(offset, "damaged header (bad checksum)"), offset + _BLOCK
    while rest := file.read(_BLOCK * 128):
        if any(rest):
            where = file.tell() - len(rest)
            where += next(number for number, value in enumerate(rest) if value) // _BLOCK * _BLOCK
            return TarFault(offset, f"an end mark, but more follows at byte {where}"), where
    return None, offset


def _next_header(file: RangedFile, offset: int) -> int | None:
    """The place of the first good header at or after `offset`; None where there is none."""
    for start in range(-(-offset // _BLOCK) * _BLOCK, file.size, _BLOCK):
        file.seek(start)
        block = file.read(_BLOCK)
        if block[_MAGIC] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                continue
            return start
    return None
