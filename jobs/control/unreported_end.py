"""The end of a run whose driver ended before the run's monitor could report it: else the run stays `submitted`."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from jobs.control.lease import is_live
from jobs.errors import OvertakenError
from jobs.run.directory import RunDirectory
from jobs.run.record import RunRecord
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def end_noted(run: RunDirectory) -> Iterator[None]:
    """Note what ends the context as the run's end, if nobody has reported anything of the run since it was entered."""
    began = time.time()
    try:
        yield
    except OvertakenError:  # another driver has the run, and reports its end
        raise
    except Exception as error:
        note_end(run, began, str(error) or type(error).__name__)
        raise


def note_end(run: RunDirectory, since_seconds: float, reason: str) -> None:
    """Write that a run has failed, into its events and its heartbeat, for those who look only there.

    Nothing is written where the heartbeat is newer than `since_seconds` (Unix time), where another driver works on the
    run, or where the run does not exist. A store that cannot be reached costs the note alone.
    """
    try:
        before = run.read_heartbeat()
        if before.get("updated_at_seconds", -1.0) >= since_seconds or not run.exists() or is_live(run):
            return
        record = RunRecord(run, run.read_events())
        record.add_event("failed", {"step": before.get("step", 0), "reason": reason})
        record.tail().write(run)
        known = {"step": 0, "total_steps": 0, "attempt": record.attempt, **before}
        run.write_heartbeat({**known, "state": "failed", "updated_at_seconds": time.time()})
    except (OSError, UserError) as error:
        logger.warning("the run's end could not be noted in its directory: %s", error)
