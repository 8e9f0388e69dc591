"""A Python process in a PID namespace of its own, as in another container on this machine: same host name and disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

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
    """Run a script there while the context is open; its namespace ends with it."""
    command = [*unshare, sys.executable, "-c", script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()
