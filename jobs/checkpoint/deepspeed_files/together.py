"""A group of ranks finds out together where the values lie in DeepSpeed's files: each looks into some of them."""

from __future__ import annotations

import dataclasses

from jobs.checkpoint.checked_files import CheckedFiles, check_sizes, with_chunks
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.deepspeed_files.zero_files import file_names, look_into
from jobs.checkpoint.deepspeed_files.zero_layout import ZeroFiles
from jobs.checkpoint.rank_group import RankGroup
from jobs.run.directory import RunDirectory


def with_chunks_together(run: RunDirectory, commit: Commit, group: RankGroup) -> Commit:
    """The commit with checksums of chunks, which the oldest have not: each rank reads some of the files. Collective."""
    if all(file.chunk_bytes for file in commit.files):
        return commit
    mine = commit.files[group.rank :: group.world_size]
    by_rank = group.gathered(group.together(lambda: with_chunks(run, commit.step, mine)))
    known = {file.name: file for files in by_rank for file in files}
    return dataclasses.replace(commit, files=tuple(known[file.name] for file in commit.files))


def layout_together(files: CheckedFiles, group: RankGroup, *, moments: bool) -> ZeroFiles:
    """Where the values lie. Collective.

    Args:
        files: Of the checkpoint.
        group: The ranks that read together.
        moments: Whether to look for AdamW's moments and step.

    Raises:
        DamagedCheckpointError: A file is missing, truncated, or not as it was written; the same on every rank.
        CheckpointError: The files are of a kind that is not handled; the same on every rank.
    """
    run, commit = files.run, files.commit
    group.together(lambda: check_sizes(run, commit, part=group.rank, parts=group.world_size, empty=True))
    found = group.together(
        lambda: look_into(run, commit, files, moments=moments, part=group.rank, parts=group.world_size)
    )
    # The first files have the names and shapes of all values in the others. They are sent separately, since the answer
    # of every rank takes as many bytes as the longest.
    firsts = {names[0] for names in file_names(commit)}
    shared = group.broadcast({name: file for name, file in found.items() if name in firsts})
    others = group.gathered([(name, file) for name, file in found.items() if name not in firsts])
    return ZeroFiles(run, commit, shared | dict(pair for pairs in others for pair in pairs))
