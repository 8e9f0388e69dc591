"""Local files: listed as a person sees them, read in part, and written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import RefusedError, StorageError

MOST_LEVELS = 100
"""Of folders in each other; a path of this many is far longer than what people make."""
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems answer that have no hard links."""


def local_files(root: str) -> Iterator[tuple[str, int]]:
    """Path relative to `root` and bytes of every file; nothing where `root` is no folder.

    Linked folders are followed, unlike in fsspec's own walk; a link to a folder that it lies in has no end, and is
    skipped. A link to nowhere counts as a file of no bytes.

    Raises:
        PermissionError: A folder cannot be read.
        StorageError: Folders lie in each other without end.
    """
    root = str(Path(root))  # as os.walk will write it
    above = {root: {os.path.realpath(root)}}
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        ancestors = above.pop(folder)
        real = {name: os.path.realpath(Path(folder, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in ancestors]
        above |= {str(Path(folder, name)): ancestors | {real[name]} for name in folders}
        relative = os.path.relpath(folder, root)
        if folders and relative.count(os.sep) + 2 > MOST_LEVELS:
            rule, remedy = (
                f"must be at most {MOST_LEVELS} levels deep",
                f"it continues below {relative[:40]}...; move it away",
            )
            raise StorageError("folder", rule, root, remedy)
        for name in names:
            if (size := _file_bytes(Path(folder, name))) is not None:
                yield name if relative == os.curdir else f"{relative}/{name}", size


def read_part(path: str, offset: int, length: int | None) -> bytes:
    """`length` bytes of a file from `offset`, or all that follow; fewer where it ends before that.

    Asks for no more memory than the file has bytes, whatever `length` is.

    Raises:
        RefusedError: It is a pipe, a socket or a device, whose reading may hang or never end.
    """
    kind = Path(path).stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # of a folder, opening it says what it is
        raise RefusedError("file", "must be a regular file", path, "it is a pipe, a socket or a device")
    with Path(path).open("rb") as file:
        here = max(0, os.fstat(file.fileno()).st_size - offset)
        wanted = here if length is None else min(length, here)
        if wanted > 0:
            file.seek(offset)
        return file.read(max(0, wanted))


def write_whole(target: Path, fill: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: `fill` a temporary one beside it, then rename that over the target."""
    with _filled(target, fill) as temporary:
        temporary.replace(target)


def write_new(target: Path, data: bytes) -> None:
    """Write a file whole or not at all, if nothing is there yet.

    Raises:
        FileExistsError: Something is.
    """
    with _filled(target, lambda temporary: temporary.write_bytes(data)) as temporary:
        try:
            os.link(temporary, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _write_beside_readers(target, data)


def _write_beside_readers(target: Path, data: bytes) -> None:
    """Write a new file under its own name: for a moment, and after a kill, a reader finds less than all of it."""
    with target.open("xb") as file:
        try:
            file.write(data)
            file.flush()
        except BaseException:
            target.unlink()
            raise


@contextlib.contextmanager
def _filled(target: Path, fill: Callable[[Path], object]) -> Iterator[Path]:
    """A temporary file beside `target`, filled and on the disk; what is left of it goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files their owner alone may read: who may read ours is up to the umask and the folder.
    temporary = target.with_name(f".convmae-{secrets.token_hex(8)}")
    temporary.touch(exist_ok=False)
    try:
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def umask_here(proc: Path = Path("/proc")) -> int:
    """This process's umask; asking the system for it would change it for a moment, for all threads."""
    with contextlib.suppress(OSError):
        for line in (proc / "self/status").read_text(errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    os.umask(mask := os.umask(0o077))
    return mask


def _refuse(error: OSError) -> None:
    """Raise what os.walk would ignore: a folder that cannot be read."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _file_bytes(path: Path) -> int | None:
    """Size of a regular file, 0 of a link to nowhere; None for a pipe, a socket or a device, whose reading may hang."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
