"""Every file below a local folder, as a person counts them: behind links too, pipes and devices left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path


def local_files(root: str) -> Iterator[tuple[str, int]]:
    """Path relative to `root` and bytes of every file; nothing where `root` is no folder.

    Linked folders are gone into, which fsspec's own walk does not do; a link to a folder that it lies in has no end,
    and is left out. A link to nowhere counts as a file of no bytes.

    Raises:
        PermissionError: A folder cannot be read.
    """
    root = str(Path(root))  # as os.walk will write it
    above = {root: {os.path.realpath(root)}}
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        ancestors = above.pop(folder)
        real = {name: os.path.realpath(Path(folder, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in ancestors]
        above |= {str(Path(folder, name)): ancestors | {real[name]} for name in folders}
        relative = os.path.relpath(folder, root)
        for name in names:
            if (size := _file_bytes(Path(folder, name))) is not None:
                yield name if relative == os.curdir else f"{relative}/{name}", size


def _refuse(error: OSError) -> None:
    """os.walk passes over what it may not read."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _file_bytes(path: Path) -> int | None:
    """Size of a regular file, 0 of a link to nowhere; None for a pipe, a socket or a device, whose reading may hang."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None
