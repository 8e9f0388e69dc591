"""A file in this machine's memory: written as memory, read as a file, gone with its process."""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path


class MemoryFile:
    """Bytes of a fixed number, which can be opened by a path while the object lives.

    Owns: the memory. It belongs to no disk and counts towards no folder, not even /dev/shm. Linux only.
    """

    def __init__(self, name: str, size: int) -> None:
        """Reserve it, filled with zeros.

        Args:
            name: Shown by tools that list what a process has open.
            size: In bytes; at least one.
        """
        handle = os.memfd_create(name)
        weakref.finalize(self, os.close, handle)
        os.ftruncate(handle, size)
        self.size = size
        self.memory = mmap.mmap(handle, size)
        """What it holds. It ends with the last view of it, which may outlive this object."""
        self.path = Path(f"/proc/{os.getpid()}/fd/{handle}")
        """Where this process, and others of its user, open it."""
