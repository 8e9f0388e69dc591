"""What all ranks read for one step, added up with the step's loss: no collective and no series of its own per rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.batch import Batch
from pipeline.dataset import Dataset
from pipeline.read_counters import ReadCounts


class StepReading(NamedTuple):
    """Sums over ranks for one step; field names are those of the monitor's counters, without `_total`."""

    substitutions: float = 0.0
    """Samples that were replaced."""
    storage_requests: float = 0.0
    storage_read_bytes: float = 0.0
    block_cache_hits: float = 0.0
    block_cache_misses: float = 0.0
    block_cache_damaged: float = 0.0
    block_cache_evictions: float = 0.0
    block_cache_off_ranks: float = 0.0
    """Ranks whose disk failed, now."""
    block_cache_bytes: float = 0.0
    """On the disk of rank 0's node, now."""


class RankReading:
    """One rank's part in it; remembers what it told last."""

    def __init__(self, dataset: Dataset, rank: int, world_size: int) -> None:
        self._dataset = dataset
        self._rank = rank
        self._world_size = world_size
        self._counts = ReadCounts()
        self._evictions = 0

    def words(self, batch: Batch) -> list[float]:
        """Numbers that the ranks add up element by element; call once a step."""
        now, cache = self._dataset.counters.read(), self._dataset.cache
        more, self._counts = now.minus(self._counts), now
        evictions = cache.evictions if cache else 0
        new_evictions, self._evictions = evictions - self._evictions, evictions
        reading = StepReading(
            substitutions=len(batch.substitutions),
            storage_requests=more.requests,
            storage_read_bytes=more.bytes,
            block_cache_hits=more.cache_hits,
            block_cache_misses=more.cache_misses,
            block_cache_damaged=more.cache_damaged,
            block_cache_evictions=new_evictions,
            block_cache_off_ranks=float(cache is not None and not cache.storing),
            block_cache_bytes=float(cache.used_bytes if cache and self._rank == 0 else 0),
        )
        waits = [0.0] * self._world_size
        waits[self._rank] = batch.wait_seconds
        return [*reading, *waits]


def word_count(world_size: int) -> int:
    """How many numbers words() gives."""
    return len(StepReading._fields) + world_size


def from_words(words: Sequence[float]) -> tuple[StepReading, float]:
    """Put together what was added up: the sums, and the longest wait of any rank in seconds."""
    fields = len(StepReading._fields)
    return StepReading(*words[:fields]), max(words[fields:])
