"""A wait for a batch, with a limit: what hangs is named, first in a warning, then in an error."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from pipeline.errors import StalledError
from pipeline.load.thread_activity import Stage, ThreadActivities

if TYPE_CHECKING:
    from pipeline.load.batch import StartedBatch

logger = logging.getLogger(__name__)

STALL_SECONDS = 300.0
"""Longer than Storage retries, so that a storage server that comes back is no stall."""


class StallWatch:
    """A watch over the batches of one loader."""

    def __init__(self, stall_seconds: float, activities: ThreadActivities) -> None:
        """Decide how long to wait.

        Args:
            stall_seconds: For one batch; half-way there is a warning.
            activities: Of the threads that make batches.
        """
        self._stall_seconds = stall_seconds
        self._activities = activities

    def wait(self, batch: StartedBatch, began: float) -> None:
        """Return when the batch is ready, or an image of it failed.

        Args:
            batch: What to wait for.
            began: When the consumer began to wait, by time.monotonic().

        Raises:
            StalledError: Neither came in time.
        """
        warned = False
        while not batch.copy.done():
            waited = time.monotonic() - began
            if waited >= self._stall_seconds:
                _log_stacks()
                raise StalledError(self._report(batch, waited))
            if waited >= self._stall_seconds / 2 and not warned:
                logger.warning("%s", self._report(batch, waited))
                warned = True
            with contextlib.suppress(TimeoutError):
                batch.copy.exception((self._stall_seconds if warned else self._stall_seconds / 2) - waited)

    def _report(self, batch: StartedBatch, waited: float) -> str:
        hanging = [item for item, done in zip(batch.pending, batch.done, strict=True) if not done]
        if not hanging:
            return f"no batch for {waited:.0f} s: step {batch.step} hangs in stage hand-over to the device"
        unread = [item.sample_id for item in hanging if not item.block.done()]
        stage: Stage = "read" if unread else "decode"
        ids = unread or [item.sample_id for item in hanging]
        return (
            f"no batch for {waited:.0f} s: step {batch.step} hangs in stage {stage}; {len(ids)} of its images are not "
            f"there, the first is sample {ids[0]}; running longest: {self._activities.oldest(stage)}"
        )


def _log_stacks() -> None:
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name.startswith("convmae-") and thread.ident in frames:
            logger.error("%s\n%s", thread.name, "".join(traceback.format_stack(frames[thread.ident])))
