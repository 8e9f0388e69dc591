"""A wait for a batch, with a limit: what hangs is named, first in a warning, then in an error."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import StalledError
from pipeline.load.thread_activity import Stage

if TYPE_CHECKING:
    from pipeline.load.batch import StartedBatch

logger = logging.getLogger(__name__)

STALL_SECONDS = 300.0
"""Longer than Storage retries, so that a storage server that comes back is no stall."""


class BatchMakers(Protocol):
    """What makes batches, and can say what it is at."""

    def oldest(self, stage: Stage) -> str:
        """The activity that has taken longest in a stage, for messages."""

    def log_stacks(self) -> None:
        """Write down where each of its threads is."""


class StallWatch:
    """A watch over the batches of one loader."""

    def __init__(self, stall_seconds: float, makers: BatchMakers) -> None:
        """Decide how long to wait.

        Args:
            stall_seconds: For one batch; half-way there is a warning.
            makers: Of the batches.
        """
        self._stall_seconds = stall_seconds
        self._makers = makers

    def wait(self, batch: StartedBatch, began: float) -> None:
        """Return when the batch is ready, or an image of it failed.

        Args:
            batch: What to wait for.
            began: When the consumer began to wait, by time.monotonic().

        Raises:
            StalledError: Neither came in time.
        """
        warned = False
        while not batch.sent.done():
            waited = time.monotonic() - began
            if waited >= self._stall_seconds:
                self._makers.log_stacks()
                raise StalledError(self._report(batch, waited))
            if waited >= self._stall_seconds / 2 and not warned:
                logger.warning("%s", self._report(batch, waited))
                warned = True
            with contextlib.suppress(TimeoutError):
                batch.sent.exception((self._stall_seconds if warned else self._stall_seconds / 2) - waited)

    def _report(self, batch: StartedBatch, waited: float) -> str:
        hanging = batch.unfinished()
        if not hanging:
            return f"no batch for {waited:.0f} s: step {batch.step} hangs in stage hand-over to the device"
        unread = [item.sample_id for item in hanging if not item.is_read]
        stage: Stage = "read" if unread else "decode"
        ids = unread or [item.sample_id for item in hanging]
        return (
            f"no batch for {waited:.0f} s: step {batch.step} hangs in stage {stage}; {len(ids)} of its images are not "
            f"there, the first is sample {ids[0]}; running longest: {self._makers.oldest(stage)}"
        )


def log_thread_stacks() -> None:
    """Log where each of this process's loader threads is."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name.startswith("convmae-") and thread.ident in frames:
            logger.error("%s\n%s", thread.name, "".join(traceback.format_stack(frames[thread.ident])))
