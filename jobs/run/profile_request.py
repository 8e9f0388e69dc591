"""A request to profile a rank of a live run, as it lies in the run directory until the monitor takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jobs.errors import RunError

MOST_STEPS = 100
"""Of one profile: each has thousands of operators, and all are in memory until they are written."""


@dataclass(frozen=True)
class ProfileRequest:
    """Which rank, and for how long."""

    rank: int
    steps: int
    key: str
    """Tells requests apart: the events that answer one quote it."""

    def check(self, world_size: int) -> None:
        """Refuse what cannot be done.

        Args:
            world_size: Ranks that train now.

        Raises:
            RunError: There is no such rank, or the steps are none or too many.
        """
        if not 0 <= self.rank < world_size:
            remedy = f"choose one from 0 to {world_size - 1}" if world_size else "wait until the run trains"
            raise RunError("--rank", f"must be one of the {world_size} that train now", self.rank, remedy)
        if not 1 <= self.steps <= MOST_STEPS:
            remedy = "a few steps show what each does; --steps 5"
            raise RunError("--steps", f"must be from 1 to {MOST_STEPS}", self.steps, remedy)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ProfileRequest:
        """From what `to_json` gives, which was checked."""
        return cls(fields["rank"], fields["steps"], fields["key"])
