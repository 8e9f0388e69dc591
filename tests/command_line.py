"""The `convmae` command as tests type it in their own process: how it ends, and how a refusal looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable

MANIFEST = Manifest(
    2, "digest", (), 0, ShardTable.of([ShardEntry("a", 600, 6000, "ab" * 32), ShardEntry("b", 425, 4250, "cd" * 32)])
)
"""A data set of 1025 samples in two shards that do not exist."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    error: str


Typed = Callable[..., Ended]
"""Types a command."""


def assert_refused(ended: Ended, *parts: str) -> None:
    """Exit code 2 and one line that says why."""
    assert ended.code == 2
    assert ended.output == ""
    (line,) = ended.error.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
