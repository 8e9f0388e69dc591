"""Restore of the newest checkpoint that is whole, which is verified while it is read.

Rank 0 reads the commit, which says where every value lies. Then each rank reads its part of the weights and the moments
that it will own, and notes the chunks that it compared. Chunks that no rank needed are dealt out and read for their
checksums. So before training starts, all ranks together have compared every byte, and read few of them twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jobs.checkpoint import checkpoint
from jobs.checkpoint.checked_files import CheckedFiles
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.deepspeed_files.together import layout_together, with_chunks_together
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.state_layout import Layout, StateLayout
from jobs.checkpoint.state_reading import read_zero_state
from jobs.checkpoint.zero_state import ZeroState
from jobs.errors import CheckpointError, DamagedCheckpointError
from jobs.run.directory import RunDirectory

logger = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint that is whole, and the part of it that this rank needs."""

    commit: Commit
    state: ZeroState


def restore_newest(
    run: RunDirectory,
    owned: Mapping[str, range],
    group: RankGroup,
    *,
    check: Callable[[Commit], None],
    on_damage: Callable[[int, str], None],
) -> Restored | None:
    """Read the newest checkpoint that is whole, the same on every rank. Collective.

    Args:
        run: Where checkpoints are.
        owned: The values whose moments this rank needs, from `zero_state.owned_ranges`.
        group: The ranks that restore together.
        check: Raises if a checkpoint that is whole must not be resumed from.
        on_damage: Called on rank 0 with each step that was skipped, and why; may raise.

    Returns:
        None where none was committed yet.

    Raises:
        CheckpointError: Some were committed and none is whole, or one is of a kind that is not handled.
    """
    # Rank 0 decides: listings may differ from rank to rank for a moment.
    steps = group.broadcast(group.together(lambda: checkpoint.committed_steps(run) if group.rank == 0 else []))
    for step in reversed(steps):
        try:
            restored = restore_step(run, step, owned, group)
        except DamagedCheckpointError as error:
            damage = str(error)
        else:
            check(restored.commit)
            return restored
        logger.error("the checkpoint of step %d is skipped: %s", step, damage)
        if group.rank == 0:
            on_damage(step, damage)
    if steps:
        remedy = "restore one of them from a copy, or start a new run"
        raise CheckpointError("checkpoint", "must be whole, and none is", ", ".join(map(str, steps)), remedy)
    return None


def restore_step(run: RunDirectory, step: int, owned: Mapping[str, range], group: RankGroup) -> Restored:
    """A checkpoint.

    Raises:
        CheckpointError: It is damaged, or not handled; the same on every rank.
    """
    found = group.together(lambda: checkpoint.read_commit(run, step) if group.rank == 0 else None)
    commit = group.broadcast(found)
    assert commit
    if commit.is_of_deepspeed:
        commit = with_chunks_together(run, commit, group)
    files = CheckedFiles(run, commit)
    layout: Layout = (
        layout_together(files, group, moments=bool(owned)) if commit.is_of_deepspeed else StateLayout(run, commit)
    )
    state = read_zero_state(files, layout, owned, group)
    left = np.array_split(np.flatnonzero(~group.union(files.checked)), group.world_size)[group.rank]
    group.together(lambda: files.check(left))
    return Restored(commit, state)
