"""The processes of a local stack: how they are found, and how they are ended.

A recorded process is known by more than its pid (its `ProcessIdentity`). Everything that the stack starts, and whatever
these processes start in turn, carries the stack's random id in its environment. Ray's workers overwrite their
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
    """Wait for the end of a process that this process started; others are left to their parents or init."""
    if record.is_judged_here() and ProcessIdentity.of(record.pid) == record:
        with suppress(ChildProcessError):
            os.waitpid(record.pid, 0)


def marked(stack_id: str) -> Iterator[psutil.Process]:
    """Yield running processes that were started by the stack or by something that it started.

    The calling process is excluded: a job may ask about the stack that it runs on.
    """
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(STACK_ID_VARIABLE) == stack_id:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def with_descendants(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Return the processes and all their descendants, without the calling process."""
    family: set[psutil.Process] = set()
    for root in roots:
        try:
            family.update([root, *root.children(recursive=True)])
        except psutil.NoSuchProcess:
            continue
    return {process for process in family if process.pid != os.getpid()}


def terminate(processes: Iterable[psutil.Process]) -> None:
    """Ask each process to end (SIGTERM), unless it is already gone.

    psutil compares creation times before it signals, so that a reused pid is never hit.
    """
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue


def kill(processes: Iterable[psutil.Process]) -> None:
    """End each process at once (SIGKILL), unless it is already gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def running(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Return those that have not ended; a zombie, which only waits for its parent, counts as ended."""
    still: set[psutil.Process] = set()
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                still.add(process)
        except psutil.NoSuchProcess:
            continue
    return still
