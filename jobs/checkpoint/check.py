"""Verification of checkpoints: each byte is compared with the commit, in parallel and in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import google_crc32c

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.errors import CheckpointError
from jobs.run.directory import RunDirectory
from jobs.terminal import bytes_text

THREADS = 8
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Listed:
    """One checkpoint as `convmae checkpoints` shows it."""

    step: int
    commit: Commit | None
    """None where the commit object cannot be read."""
    faults: tuple[str, ...]
    verified: bool | None
    """Whether every byte is as it was written; None if it was not verified."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        fields: dict[str, Any] = {"step": self.step, "verified": self.verified, "faults": list(self.faults)}
        if commit := self.commit:
            fields |= {
                "epoch": commit.epoch,
                "created_at_seconds": commit.created_at_seconds,
                "world_size": commit.world_size,
                "zero_stage": commit.zero_stage,
                "precision": commit.precision,
                "bytes": commit.bytes,
                "files": len(commit.files),
                "kind": kind_of(commit),
                "attempt": commit.attempt,
                "driver": commit.driver,
            }
        return fields

    def cells(self) -> tuple[str, ...]:
        """For people: step, epoch, time, world size, ZeRO stage, bytes, kind, verified."""
        verified = {None: "-", True: "yes", False: "NO"}[self.verified]
        if not (commit := self.commit):
            return (str(self.step), *["-"] * 6, verified)
        at = datetime.fromtimestamp(commit.created_at_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
        numbers = (commit.world_size, commit.zero_stage)
        return (
            str(self.step), str(commit.epoch), at, *map(str, numbers), bytes_text(commit.bytes), kind_of(commit),
            verified,
        )  # fmt: skip


def kind_of(commit: Commit) -> str:
    """`milestone` is kept permanently, `last` until newer ones replace it."""
    return "milestone" if commit.milestone else "last"


def list_checkpoints(
    run: RunDirectory, *, verify: bool = False, on_progress: Callable[[int, int, str], None] = lambda *_: None
) -> list[Listed]:
    """Every checkpoint of a run, by step. One that is pruned meanwhile is skipped.

    Args:
        run: It may be training.
        verify: Read every byte.
        on_progress: Called with bytes read, all bytes, and the step that is being read.
    """
    commits, unreadable = read_commits(run)
    faults = _all_faults(run, commits, on_progress) if verify else {}
    listed = [
        Listed(commit.step, commit, tuple(faults.get(commit.step, ())), not faults[commit.step] if verify else None)
        for commit in commits
    ]
    listed += [Listed(step, None, (fault,), False) for step, fault in unreadable.items()]
    there = set(checkpoint.committed_steps(run))
    return sorted((row for row in listed if row.step in there), key=lambda row: row.step)


def read_commits(run: RunDirectory) -> tuple[list[Commit], dict[int, str]]:
    """The commit objects by step, ascending; and what is wrong with those that cannot be read, by step."""
    commits, unreadable = [], {}
    for step in checkpoint.committed_steps(run):
        try:
            commits.append(checkpoint.read_commit(run, step))
        except CheckpointError as error:
            if error.field != "step":  # it was pruned meanwhile
                unreadable[step] = f"{checkpoint.commit_url(run, step)}: {error.rule}"
    return commits, unreadable


def faults_of(run: RunDirectory, commit: Commit) -> list[str]:
    """The faults of a checkpoint's files, one line each; empty if every file is as it was written."""
    return _all_faults(run, [commit], lambda *_: None)[commit.step]


def _all_faults(
    run: RunDirectory, commits: Iterable[Commit], on_progress: Callable[[int, int, str], None]
) -> dict[int, list[str]]:
    pairs = [(commit, file) for commit in commits for file in commit.files]
    total, done = sum(file.bytes for _, file in pairs), 0
    faults: dict[int, list[str]] = {commit.step: [] for commit in commits}
    with ThreadPoolExecutor(THREADS) as threads:
        for (commit, file), fault in zip(pairs, threads.map(lambda pair: _fault(run, *pair), pairs), strict=True):
            done += file.bytes
            on_progress(done, total, f"step {commit.step}")
            if fault:
                faults[commit.step].append(fault)
    return faults


def _fault(run: RunDirectory, commit: Commit, file: CheckpointFile) -> str:
    url = checkpoint.file_url(run, commit.step, file.name)
    try:
        size = run.storage.size(url)
        if size != file.bytes:
            return f"{url} has {size:,} bytes where {file.bytes:,} were written"
        checksum = 0
        for data in _pieces(run, url, size):
            checksum = google_crc32c.extend(checksum, data)
    except FileNotFoundError:
        return f"{url} is missing"
    return "" if checksum == file.crc32c else f"{url} was altered: its CRC32C is not that of the commit"


def _pieces(run: RunDirectory, url: str, size: int) -> Iterator[bytes]:
    for offset in range(0, size, _READ_BYTES):
        yield run.storage.read_range(url, offset, min(_READ_BYTES, size - offset))
