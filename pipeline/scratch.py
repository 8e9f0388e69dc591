"""Folders on the local disk for as long as something is worked on."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import psutil

_PREFIX = "convmae-scratch-"


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder, deleted with its context.

    Deletes first what processes of this host have left that were killed: they could not do it themselves.
    """
    ours = f"{_PREFIX}{socket.gethostname()}-"  # containers may share a disk, but not their processes
    for folder in Path(tempfile.gettempdir()).glob(f"{ours}*"):
        pid = folder.name.removeprefix(ours).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{ours}{os.getpid()}-")
