"""Errors in what a user gave: one small tree, readable as documentation.

Every error names the field, the rule, the value and the remedy. The command line prints it as one line, without a
traceback, and exits 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.printable import printable

LONGEST_QUOTED = 200
"""Characters."""


LONGEST_PART = 2000
"""Characters of a rule, a value or a remedy, each of which may quote something very long."""


def clipped(text: str, longest: int = LONGEST_QUOTED) -> str:
    """The part of a text that a message quotes: texts of others may be of any length."""
    return text if len(text) <= longest else f"{text[:longest]}..."


class UserError(ValueError):
    """Bad input from a user: a recipe, a URL, credentials or data."""

    def __init__(self, field: str, rule: str, value: object, remedy: str) -> None:
        super().__init__(field, rule, value, remedy)
        self.field = field
        self.rule = rule
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        parts = (clipped(text, LONGEST_PART) for text in (self.rule, repr(self.value), self.remedy))
        return printable("{}: {}, got {}; {}".format(clipped(self.field), *parts))


class StorageError(UserError):
    """A URL that cannot be used as it is: unreachable endpoint, refused credentials, missing bucket, full disk."""


class UnreachableError(StorageError):
    """A store that does not answer: the user's to fix before a run starts, and worth waiting for during one."""


class CredentialsError(StorageError):
    """Credentials that are missing, expired or refused: like `UnreachableError`, since they may be late or rotate."""


class ReplacedError(StorageError):
    """An object that has been replaced: its ETag is another."""


class RefusedError(StorageError):
    """An address that gives nothing, or no image file, while others may. The remedy says why."""


class SourceError(UserError):
    """Photographs that cannot become a dataset: no images, an unreadable folder."""


class DamagedTarsError(SourceError):
    """Tars that end early or have damaged headers; `lines` names each with its offset."""

    def __init__(self, lines: Sequence[str], tars: int) -> None:
        remedy = f"fetch them again, or keep what is left of them with --salvage; the first is {lines[0]}"
        super().__init__("tars", "must be whole", f"{len(lines)} damaged places in {tars} tars", remedy)
        self.lines = tuple(lines)


class LeaseHeldError(UserError):
    """A lease that another process holds, or took over."""


class DatasetError(UserError):
    """A dataset that is not whole: missing manifest, altered shard, unknown format version."""


class DamagedManifestError(DatasetError):
    """A manifest that is there and cannot be read."""


class OrderError(UserError):
    """Numbers that cannot be laid out as lanes of blocks: batch not divisible into lanes, too few samples."""


class StalledError(RuntimeError):
    """A batch that did not come in time; says which stage hangs. Not the user's to fix: a restart may get past it."""


class LoaderProcessError(RuntimeError):
    """Processes of a loader that die again and again. Not the user's to fix: a restart may get past it."""
