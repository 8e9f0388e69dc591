"""A Python process in a PID namespace of its own, as in another container on this machine: same host name and disk."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
SHOWS_THE_OUTER_PROC = ("unshare", "--pid", "--fork", "--kill-child")
PROJECT = Path(__file__).resolve().parents[1]


@cache
def is_allowed() -> bool:
    """Whether this user may make such namespaces on this machine."""
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False, timeout=10).returncode == 0
    except OSError:
        return False


@contextmanager
def running(script: str, *arguments: str, unshare: tuple[str, ...] = UNSHARE) -> Iterator[subprocess.Popen[str]]:
    """Run a script there while the context is open; its namespace, with what its processes held, ends with it."""
    command = [*unshare, sys.executable, "-c", script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            inside = [os.pidfd_open(child.pid) for child in psutil.Process(process.pid).children(recursive=True)]
            process.kill()
            for handle in inside:  # they are killed as their parent's end reaches them, and hold locks until then
                select.select([handle], [], [], 30)
                os.close(handle)
