"""Scratch folders on the local disk, each for as long as its process works.

Each is locked by the process that made it (flock, on the folder itself). The kernel drops the lock with the process,
however it ends, and every process on the machine can see that: containers that share a disk see each other's locks,
but not each other's processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path

PREFIX = "convmae-scratch-"
UNSEEN_SECONDS = 86_400.0
"""Age at which a folder that another boot left behind is deleted: on a disk that machines share, locks of others may
not be seen."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A folder, its lock, and its end: with the context, `cleanup`, the object or the process."""

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix=prefix)
        self._handle = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY)
        self._unlock = weakref.finalize(self, os.close, self._handle)

    def lock(self) -> bool:
        """Lock it; False if another process took it for a leftover in the moment before it was locked."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: no process can lock it to delete it, either
            pass
        return os.fstat(self._handle).st_nlink > 0 and Path(self.name).exists()

    def cleanup(self) -> None:
        """Delete it."""
        super().cleanup()
        self._unlock()


def scratch_folder() -> ScratchFolder:
    """A new folder, deleted with its context.

    First deletes the folders of processes that were killed, which could not do it themselves.
    """
    prefix = f"{PREFIX}{_boot()}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _delete_if_left(folder, is_of_this_boot=folder.name.startswith(prefix))
    while True:
        with contextlib.suppress(FileNotFoundError):
            folder_of_ours = ScratchFolder(prefix)
            if folder_of_ours.lock():
                return folder_of_ours
            folder_of_ours.cleanup()


def _delete_if_left(folder: Path, *, is_of_this_boot: bool) -> None:
    """Delete a folder that no process has locked. One that cannot be locked, or is another user's, stays."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Not possible on NFS, where a lock for writing needs a file that is open for writing: there all stay.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_of_this_boot or time.time() - os.fstat(handle).st_mtime > UNSEEN_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _boot() -> str:
    """An id of this boot of this machine; `unknown` where there is no /proc."""
    try:
        return _BOOT.read_text().strip().replace("-", "")[:12]
    except OSError:
        return "unknown"
