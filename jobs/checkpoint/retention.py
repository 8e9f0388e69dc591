"""Retention of checkpoints: old ones, damaged ones, and files that no commit names can be deleted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from jobs.checkpoint import checkpoint
from jobs.checkpoint.check import faults_of, read_commits
from jobs.checkpoint.checkpoint import CLAIMS
from jobs.checkpoint.commit import Commit
from jobs.errors import CheckpointError
from jobs.run.directory import RunDirectory
from jobs.terminal import bytes_text
from pipeline.store.lease import current_lease

_FILE = re.compile(r"(?P<folder>step-\d{8,})/(?:(?P<claim>\d{6,})-(?P<attempt>\d{4,})/)?[^/]+")


@dataclass(frozen=True)
class Pruning:
    """The plan of `convmae prune`: what it would delete."""

    old: tuple[Commit, ...]
    """Older than those that are kept, whole or not."""
    damaged: tuple[tuple[Commit, str], ...]
    """Newer than the newest that is whole, each with its first fault."""
    leftovers: Mapping[str, int]
    """Bytes of each file that no commit names, by its path below `checkpoints/`."""
    kept: tuple[int, ...]
    """Steps that stay."""

    @property
    def commits(self) -> tuple[Commit, ...]:
        """Every checkpoint that would be deleted."""
        return (*self.old, *(commit for commit, _ in self.damaged))

    @property
    def bytes(self) -> int:
        """How much would be freed."""
        return sum(commit.bytes for commit in self.commits) + sum(self.leftovers.values())


def plan_pruning(run: RunDirectory, keep: int) -> Pruning:
    """Find what can be deleted. Reads the newest checkpoints, one after another, until one is whole.

    Milestones are kept, and so is whatever a live driver may be uploading; commits of another format are kept with
    their files.

    Args:
        run: It may be training.
        keep: How many checkpoints to keep, the newest whole one and those before it; at least 1.

    Raises:
        CheckpointError: There are checkpoints, and none is whole, so none may be deleted.
    """
    left = leftovers(run)
    commits, _ = read_commits(run)
    damaged: list[tuple[Commit, str]] = []
    for commit in reversed(commits):
        if not (faults := faults_of(run, commit)):
            break
        damaged.append((commit, faults[0]))
    if commits and len(damaged) == len(commits):
        remedy = "restore one of them from a copy; `convmae checkpoints --verify` lists every fault"
        raise CheckpointError("checkpoint", "must be whole, and none is", damaged[0][1], remedy)
    older = commits[: len(commits) - len(damaged)][:-keep]
    old = tuple(commit for commit in older if not commit.milestone)
    bad = tuple((commit, fault) for commit, fault in damaged if not commit.milestone)
    gone = {commit.step for commit in old} | {commit.step for commit, _ in bad}
    return Pruning(old, bad, left, tuple(commit.step for commit in commits if commit.step not in gone))


def pruning_lines(pruning: Pruning) -> Iterator[str]:
    """What would be deleted and what would be kept, for people."""
    for commit in pruning.old:
        yield f"step {commit.step}: {bytes_text(commit.bytes)}, older than those that are kept"
    for commit, fault in pruning.damaged:
        yield f"step {commit.step}: {bytes_text(commit.bytes)}, damaged: {fault}"
    by_folder = groupby(pruning.leftovers, lambda path: path.rpartition("/")[0])
    for folder, paths in by_folder:
        sizes = [pruning.leftovers[path] for path in paths]
        yield f"checkpoints/{folder}: {len(sizes)} files, {bytes_text(sum(sizes))}, never committed"
    if not pruning.commits and not pruning.leftovers:
        yield "nothing to delete"
    yield f"stays: {', '.join(map(str, pruning.kept)) or 'none'}"


def carry_out(run: RunDirectory, pruning: Pruning) -> None:
    """Delete what was planned."""
    for commit in pruning.commits:
        checkpoint.delete(run, commit)
    _delete_files(run, pruning.leftovers)


def leftovers(run: RunDirectory) -> dict[str, int]:
    """Bytes of each file below `checkpoints/` that no commit names and no live driver may be uploading."""
    ruler = current_lease(run.storage, run.path(CLAIMS))
    living = ruler.number if ruler and not ruler.is_over and not (ruler.holder and ruler.holder.is_dead_here()) else 0
    return {path: size for path, (claim, _), size in _unnamed(run) if not living or claim < living}


def delete_leftovers_before(run: RunDirectory, claim: int, attempt: int) -> None:
    """Delete what earlier attempts and earlier drivers uploaded and never committed."""
    _delete_files(run, [path for path, owner, _ in _unnamed(run) if owner < (claim, attempt)])


def _unnamed(run: RunDirectory) -> list[tuple[str, tuple[int, int], int]]:
    """Path, owner (claim and attempt) and bytes of each file that no commit names."""
    # Files first, so that whatever is committed in between is named.
    try:
        files = run.storage.list_files(run.path("checkpoints"))
    except FileNotFoundError:
        return []
    commits, unreadable = read_commits(run)
    named = {f"{checkpoint.folder_name(commit.step)}/{file.name}" for commit in commits for file in commit.files}
    unknown = {checkpoint.folder_name(step) for step in unreadable}
    found = []
    for path, size in files.items():
        match = _FILE.fullmatch(path)
        if match and path not in named and match["folder"] not in unknown:
            found.append((path, (int(match["claim"] or 0), int(match["attempt"] or 0)), size))
    return found


def _delete_files(run: RunDirectory, paths: Iterable[str]) -> None:
    run.storage.delete_all(run.path("checkpoints", path) for path in paths)
