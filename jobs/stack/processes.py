"""Which processes belong to a local stack, and how they are ended.

A recorded process is known by more than its pid (its `ProcessIdentity`), and everything that the stack starts,
and whatever these start in turn, carries the stack's random id in its environment. Ray's workers overwrite their
environment with their title, so descendants are followed as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

import psutil

from pipeline.host.process_identity import ProcessIdentity

STACK_ID_VARIABLE = "CONVMAE_STACK_ID"


def reap(record: ProcessIdentity) -> None:
    """Wait for the end of a process that this very process started; another's is left to its parent or init."""
    if record.is_judged_here() and ProcessIdentity.of(record.pid) == record:
        with suppress(ChildProcessError):
            os.waitpid(record.pid, 0)


def marked(stack_id: str) -> Iterator[psutil.Process]:
    """Yield running processes that were started by the stack or by something that it started.

    The calling process is left out: a job may ask about the stack that it runs on.
    """
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(STACK_ID_VARIABLE) == stack_id:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def with_descendants(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Return the processes and all that descends from them, without the calling process."""
    family: set[psutil.Process] = set()
    for root in roots:
        try:
            family.update([root, *root.children(recursive=True)])
        except psutil.NoSuchProcess:
            continue
    return {process for process in family if process.pid != os.getpid()}


def terminate(processes: Iterable[psutil.Process]) -> None:
    """Ask each process to end (SIGTERM); one that is gone already is fine.

    psutil compares creation times before it signals, so that a reused pid is never hit.
    """
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue


def kill(processes: Iterable[psutil.Process]) -> None:
    """End each process at once (SIGKILL); one that is gone already is fine."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def running(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Return those that have not ended; a zombie, which only waits for its parent, has ended."""
    still: set[psutil.Process] = set()
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                still.add(process)
        except psutil.NoSuchProcess:
            continue
    return still
