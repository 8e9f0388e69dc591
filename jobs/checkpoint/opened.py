"""A checkpoint opened by one process, for its weights: checked reads of its files, and where values lie in them."""

from __future__ import annotations

from dataclasses import replace

from jobs.checkpoint.checked_files import CheckedFiles, check_sizes, with_chunks
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.deepspeed_files.zero_files import file_names, look_into
from jobs.checkpoint.deepspeed_files.zero_layout import ZeroFiles
from jobs.checkpoint.state_layout import Layout, StateLayout
from jobs.run.directory import RunDirectory


def opened(run: RunDirectory, commit: Commit) -> tuple[CheckedFiles, Layout]:
    """Its files and their layout. Reads nothing, unless the files are DeepSpeed's own, which are looked into.

    Raises:
        DamagedCheckpointError: The commit is not what was written, or a file of DeepSpeed's is missing or altered.
        CheckpointError: The files are DeepSpeed's own, and of a kind that is not handled.
    """
    if not commit.is_of_deepspeed:
        return CheckedFiles(run, commit), StateLayout(run, commit)
    file_names(commit)
    commit = replace(commit, files=tuple(with_chunks(run, commit.step, commit.files)))
    check_sizes(run, commit)
    files = CheckedFiles(run, commit)
    return files, ZeroFiles(run, commit, look_into(run, commit, files, moments=False))
