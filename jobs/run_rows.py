"""JSON of a run directory, checked before anything counts on it: a file may be damaged, or made by somebody else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from jobs.errors import RunError

Row = dict[str, Any]

_NUMBER = (int, float)
_NUMBER_OR_NONE = (int, float, type(None))
_NAMES: Mapping[tuple[type, ...], str] = {
    (int,): "an integer",
    (str,): "a string",
    _NUMBER: "a number",
    _NUMBER_OR_NONE: "a number or null",
}
_REQUIRED: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "events": {"at_seconds": _NUMBER, "attempt": (int,), "kind": (str,), "step": (int,)},
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
    "heartbeat": {"state": (str,)},
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
    "history": {"step_seconds": _NUMBER, "data_wait_seconds": _NUMBER, "samples": (str,), "skipped": (str,)},
    "quarantine": {},
    "heartbeat": {
        "updated_at_seconds": _NUMBER,
        "step": (int,),
        "total_steps": (int,),
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
        "last_step_at_seconds": _NUMBER_OR_NONE,
        "checkpoint_at_seconds": _NUMBER_OR_NONE,
        "checkpoint_seconds": _NUMBER_OR_NONE,
        "checkpoint_interval_seconds": _NUMBER_OR_NONE,
        "device": (str,),
        "metrics_url": (str,),
    },
}
"""Types of fields that some rows have."""
_LARGEST = 2**53
"""No count or time is beyond it; dates and tables take what is below."""
_REMEDIES = {"heartbeat": "delete it: a live run writes it again"}
_RESTORE = "restore the file, or move it away: what it tells is then missing"


def parsed(data: bytes, url: str) -> Any:
    """A JSON document.

    Raises:
        RunError: It is none, or holds numbers that JSON has not.
    """
    try:
        return _DECODER.decode(data.decode())
    except (ValueError, RecursionError) as error:
        cause = "too deep" if isinstance(error, RecursionError) else str(error)
        raise RunError("run directory", f"must hold JSON ({cause})", url, _RESTORE) from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def checked(kind: str, row: Any, url: str) -> Row:
    """A row with the fields that its kind has.

    Args:
        kind: `events`, `history`, `quarantine` or `heartbeat`.
        row: What was read.
        url: From where, for the message.

    Raises:
        RunError: A field is missing, or is of another type.
    """
    if not isinstance(row, dict):
        raise _refused(kind, url, "must hold JSON objects")
    for field, types in _REQUIRED[kind].items():
        if field not in row or not _fits(row[field], types):
            raise _refused(kind, url, f"must give {field}, {_NAMES[types]}")
    for field, types in _OPTIONAL[kind].items():
        if field in row and not _fits(row[field], types):
            raise _refused(kind, url, f"must give {field} as {_NAMES[types]}")
    return row


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    return not isinstance(value, (int, float)) or abs(value) < _LARGEST


def _refused(kind: str, url: str, rule: str) -> RunError:
    return RunError("run directory", rule, url, _REMEDIES.get(kind, _RESTORE))
