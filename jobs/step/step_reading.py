"""What all ranks read for one step, and how each fared: added up with the step's loss, in no collective of its own.

Each rank writes its own figures into its own places of the words and leaves the others' zero, so that their sum is a
table of all ranks, of the same step. Rank 0 alone looks at it, and passes it on as it is: what a step costs the others
does not grow with their number.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from jobs.health.interface import WorkerProbe
from jobs.metrics.rank_figures import FigureTable, RankFigures
from pipeline.load.batch import Batch
from pipeline.load.read_counters import ReadCounts

if TYPE_CHECKING:
    from pipeline.load.dataset import Dataset


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
    """One rank's part in it; remembers what it reported last."""

    def __init__(
        self,
        dataset: Dataset,
        rank: int,
        *,
        device: torch.device,
        folders: Sequence[Path] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock of the first step.

        Args:
            dataset: Whose counters are reported.
            rank: Of this process.
            device: Where it trains.
            folders: What it writes to on the node's own disks; they exist, or a folder above them does.
            clock: Seconds.
        """
        self._dataset = dataset
        self._rank = rank
        self._device = device
        self._folders = folders
        self._clock = clock
        self._stepped_at = clock()
        self._process = psutil.Process()
        self._counts = ReadCounts()
        self._evictions = 0

    def write(self, words: NDArray[np.float64], batch: Batch, probe: WorkerProbe) -> None:
        """Put numbers that the ranks add up into their places; call once a step.

        Args:
            words: (word_count,) zeros.
            batch: Of the step.
            probe: Says what the rank computed in the step before.
        """
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
        first = len(StepReading._fields) + self._rank * len(RankFigures._fields)
        words[: len(reading)] = reading
        words[first : first + len(RankFigures._fields)] = self._figures(batch, probe.poll().metrics)

    def _figures(self, batch: Batch, computed: Mapping[str, float]) -> RankFigures:
        now = self._clock()
        step_seconds, self._stepped_at = now - self._stepped_at, now
        on_gpu = self._device.type == "cuda"
        return RankFigures(
            step_seconds=step_seconds,
            data_wait_seconds=batch.wait_seconds,
            read_wait_seconds=batch.read_wait_seconds,
            compute_seconds=computed.get("compute_seconds", 0.0),
            images=computed.get("images", 0.0),
            storage_requests=self._counts.requests,
            storage_read_bytes=self._counts.bytes,
            block_cache_hits=self._counts.cache_hits,
            block_cache_misses=self._counts.cache_misses,
            memory_bytes=self._process.memory_info().rss,
            device_memory_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else 0.0,
            disk_free_ratio=min(map(free_ratio, self._folders), default=1.0),
        )


def free_ratio(folder: Path) -> float:
    """Free share, in [0, 1], of the disk that `folder` lies or will lie on; 0 where it cannot be read."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return 0.0
    return usage.free / usage.total if usage.total else 0.0


def word_count(world_size: int) -> int:
    """How many numbers the ranks add up."""
    return len(StepReading._fields) + world_size * len(RankFigures._fields)


def from_words(words: NDArray[np.float64]) -> tuple[StepReading, FigureTable]:
    """Put together what was added up: the sums over ranks, and each rank's own figures, by rank."""
    fields = len(StepReading._fields)
    return StepReading(*words[:fields].tolist()), words[fields:].reshape(-1, len(RankFigures._fields))


def slowest(ranks: FigureTable, field: str) -> float:
    """The highest of one of the ranks' figures."""
    return float(ranks[:, RankFigures._fields.index(field)].max())
