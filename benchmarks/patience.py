"""Waits, with a limit, for what another process does."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil


def wait_until(what: str, holds: Callable[[], bool], seconds: float) -> None:
    """Poll until `holds`.

    Raises:
        AssertionError: It does not in time; says for `what`.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def done(process: subprocess.Popen[str], code: int = 0, within_seconds: float = 300) -> tuple[str, str]:
    """Wait for a command's end; returns standard output and standard error.

    Raises:
        AssertionError: It ended with another code, or not in time; says what it printed.
    """
    late = False
    try:
        out, err = process.communicate(timeout=within_seconds)
    except subprocess.TimeoutExpired:
        late = True
        end(process)
        out, err = process.communicate()
    ended = f"was at work after {within_seconds} s" if late else f"ended with {process.returncode}"
    assert not late and process.returncode == code, f"{shlex.join(map(str, process.args))} {ended}\n{out}\n{err}"
    return out, err


def end(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a command and its children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        command = psutil.Process(process.pid)
        for member in [*command.children(recursive=True), command]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()
