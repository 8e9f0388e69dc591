"""Which checkpoint a worker group goes on from: the newest that is whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from jobs import checkpoint
from jobs.checkpoint import Commit
from jobs.errors import CheckpointError, DamagedCheckpointError
from jobs.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class Fetched(NamedTuple):
    """A checkpoint on local disk."""

    commit: Commit
    folder: Path
    """Holds its files, each checked against the commit."""


def fetch_newest(
    run: RunDirectory,
    scratch: Path,
    *,
    rank: int,
    world_size: int,
    check: Callable[[Commit], None],
    on_damage: Callable[[int, str], None],
) -> Fetched | None:
    """Fetch the newest checkpoint that is whole, the same on every rank. Collective.

    Args:
        run: Where checkpoints are.
        scratch: A local folder of this rank.
        rank: Of this process.
        world_size: Number of processes that restore together.
        check: Raises if a checkpoint, though whole, is not to be resumed from.
        on_damage: Is told, on rank 0, of each step that was passed over and why; may raise.

    Returns:
        None where none was committed yet.

    Raises:
        CheckpointError: Some were committed, and none is whole.
    """
    # Rank 0 decides: listings may differ from rank to rank for a moment.
    steps = _from_rank_0(checkpoint.committed_steps(run) if rank == 0 else None)
    for step in reversed(steps):
        fetched, damage = _fetch(run, step, scratch, rank)
        damages: list[Any] = [None] * world_size
        dist.all_gather_object(damages, damage)
        told = next(filter(None, damages), None)
        if fetched and not told:
            check(fetched.commit)
            return fetched
        logger.error("the checkpoint of step %d is passed over: %s", step, told)
        if rank == 0:
            on_damage(step, str(told))
    if steps:
        remedy = "bring one of them back from a copy, or start a new run"
        raise CheckpointError("checkpoint", "must be whole, and none is", ", ".join(map(str, steps)), remedy)
    return None


def _fetch(run: RunDirectory, step: int, scratch: Path, rank: int) -> tuple[Fetched | None, str]:
    commit, damage = _from_rank_0(_read(run, step) if rank == 0 else None)
    if commit is None:
        return None, damage
    folder = scratch / checkpoint.folder_name(step)
    folder.mkdir()
    try:
        checkpoint.download_files(run, commit, folder)
    except DamagedCheckpointError as error:
        return None, str(error)
    return Fetched(commit, folder), ""


def _read(run: RunDirectory, step: int) -> tuple[Commit | None, str]:
    try:
        return checkpoint.read_commit(run, step), ""
    except DamagedCheckpointError as error:
        return None, str(error)


def _from_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
