from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from jobs.metrics.rank_figures import RankFigures
from jobs.step.step_reading import RankReading, free_ratio, from_words, slowest, word_count
from pipeline.load.read_counters import ReadCounters


def stand_in_dataset() -> Any:
    return SimpleNamespace(counters=ReadCounters(), cache=None)


def computed(seconds: float, images: int) -> Any:
    metrics = {"compute_seconds": seconds, "images": images} if images else {}
    return SimpleNamespace(poll=lambda: SimpleNamespace(metrics=metrics))


def batch(wait_seconds: float, substitutions: int = 0) -> Any:
    return SimpleNamespace(
        wait_seconds=wait_seconds, read_wait_seconds=wait_seconds / 2, substitutions=[None] * substitutions
    )


def test_the_ranks_words_add_up_to_sums_and_a_table_of_ranks(tmp_path: Path) -> None:
    now = 10.0
    datasets = [stand_in_dataset() for _ in range(3)]
    readings = [
        RankReading(dataset, rank, device=torch.device("cpu"), folders=[tmp_path], clock=lambda: now)
        for rank, dataset in enumerate(datasets)
    ]
    for step in range(2):
        for rank, dataset in enumerate(datasets):
            dataset.counters.add(requests=rank + 1, bytes=1000, cache_hits=rank)
        now += 0.5 + step
        words = np.zeros((3, word_count(3)))
        for rank, reading in enumerate(readings):
            reading.write(words[rank], batch(0.1 * rank, rank), computed(0.3 + rank, 8 * step))

    sums, table = from_words(words.sum(0))
    ranks = [RankFigures(*row) for row in table.tolist()]

    assert (sums.substitutions, sums.storage_requests, sums.storage_read_bytes) == (3, 6, 3000)  # of the second step
    assert [figures.step_seconds for figures in ranks] == [1.5] * 3
    assert slowest(table, "step_seconds") == 1.5
    assert slowest(table, "data_wait_seconds") == pytest.approx(0.2)
    assert [figures.data_wait_seconds for figures in ranks] == pytest.approx([0, 0.1, 0.2])
    assert [figures.read_wait_seconds for figures in ranks] == pytest.approx([0, 0.05, 0.1])
    assert [figures.compute_seconds for figures in ranks] == pytest.approx([0.3, 1.3, 2.3])
    assert [figures.images for figures in ranks] == [8] * 3
    assert [figures.storage_requests for figures in ranks] == [2, 4, 6]  # since the start
    assert [figures.block_cache_hits for figures in ranks] == [0, 2, 4]
    assert all(figures.memory_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.5) for figures in ranks)
    assert all(figures.device_memory_bytes == 0 for figures in ranks)


def test_the_free_share_of_a_disk_is_that_of_the_nearest_folder_above(tmp_path: Path) -> None:
    stats = os.statvfs(tmp_path)

    ratio = free_ratio(tmp_path / "not" / "there" / "yet")

    assert ratio == pytest.approx(stats.f_bavail / stats.f_blocks, abs=0.02)
    assert free_ratio(Path("/proc")) == 0.0  # a file system without blocks
