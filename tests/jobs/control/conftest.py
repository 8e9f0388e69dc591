"""Monitors that tests call directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from monitored_runs import FakeClock, FlakyStorage, Start, start_monitor

from jobs.control.monitor import RunMonitor
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

    def make(directory: RunDirectory = run, **options: Any) -> RunMonitor:
        return start_monitor(directory, **options)

    return make
