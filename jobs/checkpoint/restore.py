"""Restore of the newest checkpoint that is whole, which is verified while it is read.

Rank 0 reads the commit, which says where every value lies. Then each rank reads its part of the weights and the moments
that it will own, and notes the chunks that it compared. Chunks that no rank needed are dealt out and read for their
checksums. So before training starts, all ranks together have compared every byte, and read few of them twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jobs.checkpoint import checkpoint
from jobs.checkpoint.checked_files import CheckedFiles, RangeReader
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.deepspeed_files.together import layout_together, with_chunks_together
from jobs.checkpoint.held.held_checkpoint import HeldCheckpoint
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.state_layout import Layout, StateLayout
from jobs.checkpoint.state_reading import read_zero_state
from jobs.checkpoint.zero_state import ZeroState
from jobs.errors import CheckpointError, DamagedCheckpointError
from jobs.run.directory import RunDirectory

logger = logging.getLogger(__name__)

Source = Literal["store", "memory"]
"""Where a checkpoint was read: objects by URL, or the memory of the run's nodes."""


class Restored(NamedTuple):
    """A checkpoint that is whole, and the part of it that this rank needs."""

    commit: Commit
    state: ZeroState
    source: Source = "store"


class InMemory(NamedTuple):
    """The memory checkpoint that a run's nodes hold."""

    held: HeldCheckpoint
    copies: Sequence[RangeReader]
    """The ways to read it from here, best first."""


def restore_newest(
    run: RunDirectory,
    owned: Mapping[str, range],
    group: RankGroup,
    *,
    check: Callable[[Commit], None],
    on_damage: Callable[[int, str, Source], None],
    in_memory: InMemory | None = None,
) -> Restored | None:
    """Read the newest checkpoint that is whole, the same on every rank. Collective.

    Args:
        run: Where checkpoints are.
        owned: The values whose moments this rank needs, from `zero_state.owned_ranges`.
        group: The ranks that restore together.
        check: Raises if a checkpoint that is whole must not be resumed from.
        on_damage: Called on rank 0 with each step that was skipped, why, and whose checkpoint it was; may raise.
        in_memory: What nodes hold, the same checkpoint on every rank; read if the store has no newer one.

    Returns:
        None where none was committed yet.

    Raises:
        CheckpointError: Some were committed and none is whole, or one is of a kind that is not handled.
    """
    # Rank 0 decides: listings may differ from rank to rank for a moment.
    steps = group.broadcast(group.together(lambda: checkpoint.committed_steps(run) if group.rank == 0 else []))
    tries: list[tuple[int, Source]] = [(step, "store") for step in reversed(steps)]
    if in_memory and in_memory.held.commit.step >= max(steps, default=0):
        tries.insert(0, (in_memory.held.commit.step, "memory"))
    for step, source in tries:
        try:
            if source == "memory" and in_memory:
                commit = in_memory.held.commit
                restored = _restored(CheckedFiles(run, commit, in_memory.copies), owned, group, source)
            else:
                restored = restore_step(run, step, owned, group)
        except DamagedCheckpointError as error:
            damage = str(error)
        else:
            check(restored.commit)
            return restored
        logger.error("the checkpoint of step %d in %s is skipped: %s", step, source, damage)
        if group.rank == 0:
            on_damage(step, damage, source)
    if steps:
        remedy = "restore one of them from a copy, or start a new run"
        raise CheckpointError("checkpoint", "must be whole, and none is", ", ".join(map(str, steps)), remedy)
    return None


def restore_step(run: RunDirectory, step: int, owned: Mapping[str, range], group: RankGroup) -> Restored:
    """A checkpoint of the store.

    Raises:
        CheckpointError: It is damaged, or not handled; the same on every rank.
    """
    found = group.together(lambda: checkpoint.read_commit(run, step) if group.rank == 0 else None)
    commit = group.broadcast(found)
    assert commit
    if commit.is_of_deepspeed:
        commit = with_chunks_together(run, commit, group)
    return _restored(CheckedFiles(run, commit), owned, group, "store")


def _restored(files: CheckedFiles, owned: Mapping[str, range], group: RankGroup, source: Source) -> Restored:
    commit = files.commit
    layout: Layout = (
        layout_together(files, group, moments=bool(owned)) if commit.is_of_deepspeed else StateLayout(files.run, commit)
    )
    state = read_zero_state(files, layout, owned, group)
    left = np.array_split(np.flatnonzero(~group.union(files.checked)), group.world_size)[group.rank]
    group.together(lambda: files.check(left))
    return Restored(commit, state, source)
