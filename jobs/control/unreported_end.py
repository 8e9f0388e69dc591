"""The end of a run whose driver ended before the run's monitor could report it: else the run stays `submitted`."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.control.lease import is_live
from jobs.errors import OvertakenError
from jobs.notices.notifier import Notifier, Patience
from jobs.notices.webhook import Webhook
from jobs.run.directory import RunDirectory
from jobs.run.record import RunRecord
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

PATIENCE = Patience(answer_seconds=5.0, end_seconds=15.0)
"""For which a command waits that ends with this."""


@contextlib.contextmanager
def end_noted(run: RunDirectory, environ: Mapping[str, str]) -> Iterator[None]:
    """Note what ends the context as the run's end, if nobody has reported anything of the run since it was entered.

    Args:
        run: The run.
        environ: Of the session, for `note_end`.
    """
    began = time.time()
    try:
        yield
    except OvertakenError:  # another driver has the run, and reports its end
        raise
    except Exception as error:
        note_end(run, began, str(error) or type(error).__name__, environ)
        raise


def note_end(run: RunDirectory, since_seconds: float, reason: str, environ: Mapping[str, str]) -> None:
    """Write that a run has failed, into its events and its heartbeat, and notify people by its webhook.

    Nothing is written where the heartbeat is newer than `since_seconds` (Unix time), where another driver works on the
    run, or where the run does not exist. A store that cannot be reached costs the note alone.

    Args:
        run: The run.
        since_seconds: When its last driver began.
        reason: Why it ended.
        environ: Has the webhook's URL.
    """
    try:
        before = run.read_heartbeat()
        if before.get("updated_at_seconds", -1.0) >= since_seconds or not run.exists() or is_live(run):
            return
        events = run.read_events()
        record = RunRecord(run, events)
        event = record.add_event("failed", {"step": before.get("step", 0), "reason": reason})
        record.tail().write(run)
        known = {"step": 0, "total_steps": 0, "attempt": record.attempt, **before}
        run.write_heartbeat({**known, "state": "failed", "updated_at_seconds": time.time()})
        _notify(run, record, [*events, event], environ)
    except (OSError, UserError) as error:
        logger.warning("the run's end could not be noted in its directory: %s", error)


def _notify(
    run: RunDirectory, record: RunRecord, events: Sequence[Mapping[str, Any]], environ: Mapping[str, str]
) -> None:
    """Notify people of the last event, and of what the monitors before could not deliver."""
    webhook = Webhook.of(run.read_recipe_fields(), environ, run)
    if webhook is None:
        return

    def report(kind: str, reason: str) -> None:
        record.add_event(kind, {"step": events[-1]["step"], "reason": reason})
        record.tail().write(run)

    notifier = Notifier(webhook, run, events[:-1], report, PATIENCE)
    notifier.see_event(events[-1])
    notifier.end()
