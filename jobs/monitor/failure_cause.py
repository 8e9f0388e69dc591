"""The cause of the end of an attempt, in one line: the root cause among the errors of all ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from jobs.cluster.interfaces import UNREACHED_REMEDY
from jobs.errors import NotCommittedError, RunFailedError
from pipeline.errors import ReplacedError, StorageError, UnreachableError, UserError

# Deaths that follow from another rank's: its peers see the connection break.
_COLLATERAL = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe")

# Of gloo, NCCL and the store at which ranks meet: what connecting ends with where it was never possible.
_UNREACHED = (
    "connectfullmesh failed",
    "connection refused",
    "network is unreachable",
    "no route to host",
    "timed out connecting",
    "client socket has timed out",
    "ncclsystemerror",
)


Remedy = Literal["restart", "restart after progress", "none"]
"""What may fix a failure: a restart; one only where the run has trained before, so that what it needs was there once;
or nothing, since the same would be met again."""


class Failure(NamedTuple):
    """Why an attempt ended."""

    cause: str
    """In one line."""
    remedy: Remedy


def describe_failure(worker_exceptions: Mapping[int, Exception]) -> Failure:
    """The root cause among the errors of an attempt.

    When one rank dies its peers fail too, in their collectives; those are named only if there is nothing else.
    """
    causes = {rank: _cause(error) for rank, error in worker_exceptions.items()}
    remedy = max((_remedy(cause) for cause in causes.values()), key=get_args(Remedy).index)

    def suspicion(rank: int) -> int:
        cause, text = causes[rank], str(causes[rank]).lower()
        if isinstance(cause, UserError):
            return 0
        return 2 if any(word in text for word in _COLLATERAL) else 1

    rank = min(sorted(causes), key=suspicion)
    return Failure(f"rank {rank}: {_line(causes[rank])}", remedy)


def describe_start_failure(error: Exception) -> Failure:
    """The same of an attempt that could not be started."""
    cause = _cause(error)
    return Failure(f"start of the ranks: {_line(cause)}", _remedy(cause))


def _line(cause: BaseException) -> str:
    """The class and first line of an error; with what to do about it where ranks did not reach each other."""
    text = str(cause).strip()
    line = f"{type(cause).__name__}: {text.splitlines()[0] if text else ''}"
    if isinstance(cause, UserError) or not any(word in text.lower() for word in _UNREACHED):
        return line
    return f"{line}; {UNREACHED_REMEDY}"


def _remedy(cause: BaseException) -> Remedy:
    """An unreachable object store may come back. One that refuses us, or is full, did not when the run began."""
    if not isinstance(cause, UserError) or isinstance(cause, UnreachableError | NotCommittedError):
        return "restart"
    is_about_the_store = isinstance(cause, StorageError) and not isinstance(cause, ReplacedError)
    return "restart after progress" if is_about_the_store else "none"


def _cause(error: BaseException) -> BaseException:
    """What Ray Train and Ray wrapped."""
    for attribute in ("health_check_failure", "_base_exc", "cause", "__cause__"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return _cause(inner)
    return error


def root_cause(error: BaseException) -> str:
    """The reason that the reporter gave, if Ray Train wrapped it; else the error's own last line."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, RunFailedError):
            return str(current)
        current = getattr(current, "controller_failure", None) or current.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]


def failure_cause(error: str) -> str:
    """The class of the error that `describe_failure` names, or `other`: a label with few values."""
    found = re.match(r"(?:rank \d+|start of the ranks): (\w+)", error)
    return found[1] if found else "other"
