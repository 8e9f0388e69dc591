"""Which checkpoint a worker group goes on from: the newest that is whole, found out while it is read.

Each rank reads what it needs, and knows of which chunks. What no rank has needed is dealt out and read for its
checksums, so that all ranks together have compared every byte before training starts.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist

from jobs import checkpoint
from jobs.checked_files import CheckedFiles, with_chunks
from jobs.checkpoint import CheckpointFile, Commit
from jobs.errors import CheckpointError, DamagedCheckpointError
from jobs.run_directory import RunDirectory
from jobs.zero_state import ZeroState, read_zero_state

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Restored(NamedTuple):
    """A checkpoint that is whole, and what this rank needs of it."""

    commit: Commit
    state: ZeroState


def restore_newest(
    run: RunDirectory,
    owned: Mapping[str, range],
    *,
    rank: int,
    world_size: int,
    check: Callable[[Commit], None],
    on_damage: Callable[[int, str], None],
) -> Restored | None:
    """Read the newest checkpoint that is whole, the same on every rank. Collective.

    Args:
        run: Where checkpoints are.
        owned: The values whose moments this rank needs, from `zero_state.owned_ranges`.
        rank: Of this process.
        world_size: Number of processes that restore together.
        check: Raises if a checkpoint, though whole, is not to be resumed from.
        on_damage: Is told, on rank 0, of each step that was passed over and why; may raise.

    Returns:
        None where none was committed yet.

    Raises:
        CheckpointError: Some were committed, and none is whole; or one is of a kind that is not handled.
    """
    # Rank 0 decides: listings may differ from rank to rank for a moment.
    steps = _from_rank_0(checkpoint.committed_steps(run) if rank == 0 else None)
    for step in reversed(steps):
        restored, damage = _restore(run, step, owned, rank, world_size)
        if restored:
            check(restored.commit)
            return restored
        logger.error("the checkpoint of step %d is passed over: %s", step, damage)
        if rank == 0:
            on_damage(step, damage)
    if steps:
        remedy = "bring one of them back from a copy, or start a new run"
        raise CheckpointError("checkpoint", "must be whole, and none is", ", ".join(map(str, steps)), remedy)
    return None


def _restore(
    run: RunDirectory, step: int, owned: Mapping[str, range], rank: int, world_size: int
) -> tuple[Restored | None, str]:
    """A checkpoint, or what is wrong with it; the same on every rank."""
    commit, damage = _from_rank_0(_attempt(lambda: checkpoint.read_commit(run, step)) if rank == 0 else None)
    if commit is None:
        return None, damage
    commit, damage = _with_chunks(run, commit, rank, world_size)
    if damage:
        return None, damage
    files = CheckedFiles(run, commit)
    state, damage = _attempt(lambda: read_zero_state(files, owned))
    checked, damage = _gathered(files.checked, damage, world_size)
    if state is None or damage:
        return None, damage
    left = np.flatnonzero(~np.logical_or.reduce(checked))
    _, damage = _attempt(lambda: files.check(np.array_split(left, world_size)[rank]))
    _, damage = _gathered(None, damage, world_size)
    return (None if damage else Restored(commit, state)), damage


def _with_chunks(run: RunDirectory, commit: Commit, rank: int, world_size: int) -> tuple[Commit, str]:
    """The commit with checksums of chunks; of an older one, each rank reads some of the files for them."""
    if all(file.chunk_bytes for file in commit.files):
        return commit, ""
    mine, damage = _attempt(lambda: with_chunks(run, commit.step, commit.files[rank::world_size]))
    by_rank, damage = _gathered(mine or [], damage, world_size)
    if damage:
        return commit, damage
    known: dict[str, CheckpointFile] = {file.name: file for files in by_rank for file in files}
    return dataclasses.replace(commit, files=tuple(known[file.name] for file in commit.files)), ""


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """What comes of it, and what is wrong with the checkpoint if that is why nothing does."""
    try:
        return work(), ""
    except DamagedCheckpointError as error:
        return None, str(error)


def _gathered(value: T, damage: str, world_size: int) -> tuple[list[T], str]:
    """Every rank's value, and the first damage that one of them found. Collective."""
    by_rank: list[Any] = [None] * world_size
    dist.all_gather_object(by_rank, (value, damage))
    return [found for found, _ in by_rank], next((told for _, told in by_rank if told), "")


def _from_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
