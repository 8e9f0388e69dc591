"""Counters of what one process read, and from where, over its life."""

from __future__ import annotations

import threading
from typing import NamedTuple


class ReadCounts(NamedTuple):
    """Totals; differences of two say what happened in between."""

    requests: int = 0
    """Ranged reads of the object store for images; one that is repeated after a fault counts once."""
    bytes: int = 0
    """Received from the object store for images."""
    cache_hits: int = 0
    """Reads of a block, or of part of one, that the disk served."""
    cache_misses: int = 0
    cache_damaged: int = 0
    """Blocks on the disk that were found damaged, and read again from the object store."""

    def minus(self, before: ReadCounts) -> ReadCounts:
        """The counts since `before`."""
        return ReadCounts(*(now - then for now, then in zip(self, before, strict=True)))


class ReadCounters:
    """Counts that several threads add to."""

    def __init__(self) -> None:
        self._counts = ReadCounts()
        self._lock = threading.Lock()

    def add(self, **more: int) -> None:
        """Add to some of the counts, by name."""
        with self._lock:
            self._counts = self._counts._replace(
                **{name: getattr(self._counts, name) + value for name, value in more.items()}
            )

    def read(self) -> ReadCounts:
        """The totals now."""
        return self._counts
