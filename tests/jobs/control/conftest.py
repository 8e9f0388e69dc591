"""Monitors that tests call directly."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from monitored_runs import (
    EVERY_TEN,
    IMAGES,
    SCHEDULE,
    FakeClock,
    FlakyStorage,
    Start,
)

from jobs.control.monitor import RunMonitor
from jobs.control.run_memory import Clock, MonitorConfig
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.of(FlakyStorage(), str(tmp_path / "runs"), "first")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def start(run: RunDirectory) -> Start:
    """Starts a monitor of the run that writes only when told to; a second call is what a new driver does."""

    def make(
        max_restarts: int = 2,
        targets_folder: str = "",
        interval: IntervalRule = EVERY_TEN,
        flush_seconds: float = 3600.0,
        compact_seconds: float = 3600.0,
        claim: int = 1,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> RunMonitor:
        config = MonitorConfig(
            run=run,
            schedule=SCHEDULE,
            global_batch_size=IMAGES,
            max_restarts_without_progress=max_restarts,
            target_world_size=3,
            checkpoint_interval=interval,
            device="cpu",
            hang_seconds=30.0,
            host="127.0.0.1",
            metrics_port=0,
            targets_folder=targets_folder,
            flush_seconds=flush_seconds,
            compact_seconds=compact_seconds,
            claim=claim,
        )
        return RunMonitor(config, Clock(wall, monotonic))

    return make
