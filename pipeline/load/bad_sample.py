"""A sample that cannot be used as it was ingested: its fault, and where it lies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.errors import DatasetError

FaultKind = Literal["index", "missing", "replaced", "truncated", "header", "checksum", "undecodable"]
"""In the order in which they are checked for."""
OnBadSample = Literal["fail", "skip"]
MAX_CONSECUTIVE_BAD_SAMPLES = 100

_FIELDS: dict[FaultKind, str] = {"index": "shard index", "undecodable": "sample"}


@dataclass(frozen=True)
class BadSample:
    """One sample and its fault."""

    id: int
    """Its place in the dataset, from 0."""
    shard: str
    member: str
    """Name of the image in the tar; empty where the index is what is damaged."""
    offset: int
    """Byte in the tar at which the image begins; -1 where the index is what is damaged."""
    length: int
    """Bytes of the image, as ingested."""
    url: str
    """Of the tar, or of the index where that is what is damaged."""
    fault: FaultKind
    reason: str

    def error(self, remedy: str = "continue without it: on_bad_sample=skip") -> DatasetError:
        """The error that stops a run which does not skip.

        Args:
            remedy: What can be done beside restoring it or making the dataset again.
        """
        rule = "must be a whole JPEG" if self.fault == "undecodable" else "must be as it was ingested"
        remedy = f"{self.reason}; restore it, make the dataset again, or {remedy}"
        return DatasetError(_FIELDS.get(self.fault, "shard"), rule, self.url, remedy)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)
