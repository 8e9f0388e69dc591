"""Per-rank step metrics, which the monitor serves; its process needs no PyTorch for them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class RankFigures(NamedTuple):
    """Metrics of one rank in a step; field names are those of the exporter's series, after `convmae_rank_`."""

    step_seconds: float = 0.0
    """Since its last step."""
    data_wait_seconds: float = 0.0
    """Of these, without a batch."""
    read_wait_seconds: float = 0.0
    """Of these, for bytes; the rest for decoding."""
    compute_seconds: float = 0.0
    """Of the step before, until the rank met the others; 0 where that cannot be separated (ZeRO 3)."""
    images: float = 0.0
    """For which it computed then; 0 in the first step of an attempt, before which there is none."""
    storage_requests: float = 0.0
    """Since the worker started, as the next three."""
    storage_read_bytes: float = 0.0
    block_cache_hits: float = 0.0
    block_cache_misses: float = 0.0
    memory_bytes: float = 0.0
    """Of the worker's process, resident, now."""
    device_memory_bytes: float = 0.0
    """Most that PyTorch held on the GPU; 0 on a CPU."""
    disk_free_ratio: float = 0.0
    """Free share of the fullest disk to which the worker writes, now; 0 if unknown."""


FigureTable = NDArray[np.float64]
"""(ranks, fields of RankFigures), by rank: one object to send, however many ranks there are."""
