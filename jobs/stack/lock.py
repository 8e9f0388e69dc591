"""The lock of a running stack, which shows that it runs where its processes are not seen: in containers with its home.

The keeper locks a file of the home (flock), and the services inherit the open file: the kernel keeps the lock until the
last of them has ended in whatever way, and shows it to every process on the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

_NAME = "alive.lock"


class StackLock:
    """The lock of a running stack; held by all processes that inherit `handle`."""

    def __init__(self, home: Path) -> None:
        self.handle = os.open(home / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._is_ours = False

    def hold(self) -> None:
        """Take the lock, unless services of an earlier keeper still hold it; call again until they have ended."""
        if not self._is_ours:
            with contextlib.suppress(OSError):  # a file system without locks: then only processes show it
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._is_ours = True


def is_held(home: Path) -> bool:
    """Whether a process of a stack in this home is running, in whichever container of this machine."""
    try:
        handle = os.open(home / _NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, so that of two processes which ask at once neither takes the other for the stack
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
