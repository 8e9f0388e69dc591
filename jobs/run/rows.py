"""JSON of a run directory, checked before anything counts on it: a file may be damaged, or made by somebody else."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from jobs.errors import RunError
from pipeline.errors import clipped
from pipeline.store.json_text import parsed_json

Row = dict[str, Any]

_NUMBER = (int, float)
_TIME = (float, int)
"""A Unix time: one that a calendar has."""
_NUMBER_OR_NONE = (int, float, type(None))
_TIME_OR_NONE = (float, int, type(None))
_NAMES: Mapping[tuple[type, ...], str] = {
    (int,): "an integer",
    (str,): "a string",
    _NUMBER: "a number",
    _TIME: "a Unix time",
    _NUMBER_OR_NONE: "a number or null",
    _TIME_OR_NONE: "a Unix time or null",
}
_REQUIRED: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "events": {"at_seconds": _TIME, "attempt": (int,), "kind": (str,), "step": (int,)},
    "history": {
        "step": (int,),
        "epoch": (int,),
        "loss": _NUMBER_OR_NONE,
        "learning_rate": _NUMBER,
        "world_size": (int,),
        "attempt": (int,),
    },
    "quarantine": {
        "step": (int,),
        "id": (int,),
        "fault": (str,),
        "url": (str,),
        "reason": (str,),
        "substitute": (int,),
        "attempt": (int,),
    },
    "heartbeat": {"state": (str,), "updated_at_seconds": _TIME, "step": (int,), "total_steps": (int,)},
    "left-out": {"first_step": (int,), "last_step": (int,)},
}
"""Fields of every row, by what it is a row of."""
_OPTIONAL: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "events": {
        "world_size": (int,),
        "steps_redone": (int,),
        "bytes": (int,),
        "stall_seconds": _NUMBER,
        "duration_seconds": _NUMBER,
        "down_seconds": _NUMBER,
        "reason": (str,),
    },
    "history": {
        "step_seconds": _NUMBER,
        "data_wait_seconds": _NUMBER,
        "samples": (str,),
        "digest": (str,),
        "skipped": (str,),
    },
    "quarantine": {},
    "left-out": {},
    "heartbeat": {
        "steps_per_epoch": (int,),
        "attempt": (int,),
        "restarts": (int,),
        "world_size": _NUMBER_OR_NONE,
        "target_world_size": _NUMBER_OR_NONE,
        "quarantined": _NUMBER_OR_NONE,
        "loss": _NUMBER_OR_NONE,
        "learning_rate": _NUMBER_OR_NONE,
        "images_per_second": _NUMBER_OR_NONE,
        "data_wait_ratio": _NUMBER_OR_NONE,
        "eta_seconds": _NUMBER_OR_NONE,
        "worker_seconds_total": _NUMBER_OR_NONE,
        "last_step_at_seconds": _TIME_OR_NONE,
        "checkpoint_at_seconds": _TIME_OR_NONE,
        "checkpoint_seconds": _NUMBER_OR_NONE,
        "checkpoint_interval_seconds": _NUMBER_OR_NONE,
        "device": (str,),
        "metrics_url": (str,),
    },
}
"""Types of fields that some rows have."""
_LARGEST = 2**53
"""No count is beyond it."""
_LAST_SECOND = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
"""Of times; `datetime` has none behind it."""
_OF_KINDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "checkpoint": {"bytes": (int,), "stall_seconds": _NUMBER, "duration_seconds": _NUMBER},
    "recovered": {"down_seconds": _NUMBER},
    "checkpoint-interval": {"seconds": _NUMBER},
}
"""Fields that events have besides, by their kind."""
_ATTEMPT = {"world_size": (int,)}
"""Fields that events have besides which begin an attempt."""
_COUNTER = "_total"
"""In the names of what is counted over a run's whole life."""
_REMEDIES = {"heartbeat": "delete it: a live run writes it again"}
_RESTORE = "restore the file, or move it away: what it tells is then missing"


def parsed(data: bytes, url: str) -> Any:
    """A JSON document.

    Raises:
        RunError: It is none, or holds numbers that JSON has not.
    """
    try:
        return parsed_json(data)
    except ValueError as error:
        raise RunError("run directory", f"must hold JSON ({error})", url, _RESTORE) from None


def checked(kind: str, row: Any, url: str) -> Row:
    """A row with the fields that its kind has.

    Args:
        kind: `events`, `history`, `quarantine`, `left-out` or `heartbeat`.
        row: What was read.
        url: From where, for the message.

    Raises:
        RunError: A field is missing, or is of another type.
    """
    if not isinstance(row, dict):
        raise _refused(kind, url, "must hold JSON objects")
    required = {**_REQUIRED[kind], **(_of_event(row) if kind == "events" else {})}
    for field, types in required.items():
        if field not in row or not _fits(row[field], types):
            raise _refused(kind, url, f"must give {field}, {_NAMES[types]}")
    for field, types in _OPTIONAL[kind].items():
        if field in row and not _fits(row[field], types):
            raise _refused(kind, url, f"must give {field} as {_NAMES[types]}")
    for field, value in row.items():
        if _COUNTER in field and not _fits(value, _NUMBER):
            raise _refused(kind, url, f"must give {clipped(field)} as a number")
    return row


def _of_event(row: Row) -> Mapping[str, tuple[type, ...]]:
    kind = row.get("kind")
    besides = _OF_KINDS.get(kind, {}) if isinstance(kind, str) else {}
    return {**besides, **(_ATTEMPT if "steps_redone" in row else {})}


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    if isinstance(value, (int, float)):
        return is_time(value) if types in (_TIME, _TIME_OR_NONE) else abs(value) < _LARGEST
    return True


def is_time(value: Any) -> bool:
    """Whether a value is a Unix time, in seconds, that a calendar has."""
    return type(value) in (int, float) and 0 <= value <= _LAST_SECOND


def _refused(kind: str, url: str, rule: str) -> RunError:
    return RunError("run directory", rule, url, _REMEDIES.get(kind, _RESTORE))
