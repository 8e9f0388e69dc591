"""Saving in the background of training: the step loop waits for a copy in memory; a thread uploads it.

A checkpoint takes three stages. Every rank copies its part of the state off the device, for which training pauses.
Every rank uploads its copy in a thread. When the ranks have seen, by a flag that travels with their loss, that all
uploads have ended, they report to rank 0 what they uploaded, and a thread of rank 0 writes the commit object. Until
then the checkpoint is invisible, and a kill at any moment leaves the previous one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from jobs.checkpoint import checkpoint, retention
from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.checkpoint.rank_file import RankPart
from jobs.errors import NotCommittedError
from jobs.run.directory import RunDirectory
from pipeline.host.daemon_threads import DaemonThreads

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """One rank's part in saving checkpoints, one at a time.

    Owns: the thread that uploads and commits the checkpoint that is under way.
    Concurrency: called by the training thread. `begin` and `finish` are collective: every rank calls them after the
        same step.
    Failure: an upload or commit that fails after Storage's retries is logged and reported to the monitor; training
        continues, nothing became visible, and the next checkpoint is saved when it is due. Only `close` raises.
    Blocking: `begin` waits for the copy and for a checkpoint that is still under way, `finish` for uploads.
    """

    def __init__(self, run: RunDirectory, monitor: ActorHandle[Any], *, rank: int, world_size: int, keep: int) -> None:
        """Start the thread; does no I/O.

        Args:
            run: Where checkpoints go.
            monitor: Receives a report of each one that was committed or failed.
            rank: Of this process.
            world_size: Number of processes that save together.
            keep: How many of the newest checkpoints are not pruned.
        """
        self._run, self._monitor, self._keep = run, monitor, keep
        self._rank, self._world_size = rank, world_size
        self._thread = DaemonThreads(1, "convmae-save")
        self._upload: Future[CheckpointFile] | None = None
        self._commit: Commit | None = None
        self._part: RankPart | None = None
        self._committing: Future[None] | None = None
        self._began = self._stall_seconds = 0.0
        self._failure = ""

    @property
    def is_under_way(self) -> bool:
        """Whether a checkpoint was begun and is not finished; the same on every rank."""
        return self._commit is not None

    @property
    def is_uploading(self) -> bool:
        """Whether this rank's files are still on their way."""
        return self._upload is not None and not self._upload.done()

    def begin(self, commit: Commit, copied: Callable[[], RankPart]) -> RankPart:
        """Copy this rank's part of the state and start its upload.

        Args:
            commit: What will be committed, without its files. Rank 0's is used; claim and attempt are the same on all.
            copied: Copies this rank's part; called when no earlier copy is uploaded any more.

        Returns:
            The copy.
        """
        self._began = time.monotonic()
        self.finish()
        self._part = part = copied()
        part.claim()
        owner = checkpoint.owner_name(commit.claim, commit.attempt)
        upload = functools.partial(checkpoint.upload, self._run, commit.step, part.path, part.places)
        self._commit = dataclasses.replace(commit, tensors=part.tensors, optimizer_step=part.optimizer_step)
        self._upload = self._thread.submit(upload, content=part.content, owner=owner)
        self._stall_seconds = time.monotonic() - self._began
        return part

    def finish(self) -> None:
        """Wait for the uploads of the checkpoint that is under way, and begin its commit. Collective."""
        if self._commit is None or self._upload is None or self._part is None:
            return
        began = time.monotonic()
        by_rank: list[Any] = [None] * self._world_size if self._rank == 0 else []
        # To rank 0 alone: with checksums the files of all ranks take megabytes, and each answer as much as the longest.
        dist.gather_object(_outcome(self._upload), by_rank or None)
        errors = [f"rank {rank}: {found}" for rank, found in enumerate(by_rank) if isinstance(found, str)]
        self._part.release()
        commit, self._commit, self._upload, self._part = self._commit, None, None, None
        self._await_commit()
        self._failure = ""
        self._stall_seconds += time.monotonic() - began
        if errors:
            self._fail(commit.step, "; ".join(errors))
        elif self._rank == 0:
            whole = dataclasses.replace(commit, files=tuple(by_rank))
            self._committing = self._thread.submit(self._make_visible, whole, self._began, self._stall_seconds)

    def settle(self) -> None:
        """Finish what is under way, and wait until it is committed or has failed. Collective."""
        self.finish()
        self._await_commit()

    def close(self) -> None:
        """Settle, and end the thread. Collective.

        Raises:
            NotCommittedError: The last checkpoint was not committed; on every rank.
        """
        self.settle()
        failure = [self._failure]
        dist.broadcast_object_list(failure, src=0)
        self._thread.shutdown()
        if failure[0]:
            remedy = "fix the storage and resume; the checkpoint before this one is whole"
            raise NotCommittedError("checkpoint", "must be committed before the run ends", failure[0], remedy)

    def _make_visible(self, commit: Commit, began: float, stall_seconds: float) -> None:
        """Rank 0's thread: history first, then the commit object, then old checkpoints."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self._monitor.flush.remote())  # history up to a commit is never lost
            checkpoint.write_commit(self._run, commit)
        except Exception as error:
            self._fail(commit.step, f"{type(error).__name__}: {error}")
            return
        reported = self._monitor.checkpoint_committed.remote(
            step=commit.step,
            stall_seconds=stall_seconds,
            duration_seconds=time.monotonic() - began,
            size_bytes=commit.bytes,
            milestone=commit.milestone,
        )
        with contextlib.suppress(RayError):  # a monitor that has just died misses the event, not the commit
            ray.get(reported)  # else the end of the run might overtake it
        try:
            checkpoint.prune(self._run, self._keep, newest=commit.step)
            retention.delete_leftovers_before(self._run, commit.claim, commit.attempt)
        except Exception:
            logger.warning("old checkpoints could not be deleted; the next commit tries again", exc_info=True)

    def _await_commit(self) -> None:
        if self._committing is not None:
            self._committing.result()
            self._committing = None

    def _fail(self, step: int, error: str) -> None:
        self._failure = f"step {step}: {error}"
        logger.error("checkpoint of step %d was not saved: %s", step, error)
        if self._rank == 0:
            self._monitor.checkpoint_failed.remote(step=step, error=error)


def _outcome(upload: Future[CheckpointFile]) -> CheckpointFile | str:
    """What was uploaded, or why it was not, as it is sent to rank 0."""
    try:
        return upload.result()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
