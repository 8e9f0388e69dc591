"""The command and a data set on the session's local stack, and monitors that tests call directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from monitored_runs import FakeClock, FlakyStorage, Start, start_monitor
from testbed import TILES, Command

from jobs.monitor.monitor import RunMonitor
from jobs.run.directory import RunDirectory
from jobs.stack.record import Stack
from pipeline.ingest.photographs import cut_tiles


@pytest.fixture(scope="session")
def convmae(local_stack: Stack) -> Command:
    """The command, with the local stack up."""
    return Command(local_stack, local_stack.settings.home)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of real photographs, and among them one file that is not an image."""
    folder = tmp_path_factory.mktemp("photographs")
    cut_tiles(folder, TILES, seed=0)
    (folder / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff this is not a photograph")
    return folder


@pytest.fixture(scope="session")
def data(convmae: Command, photographs: Path) -> str:
    """URL of a data set of real photographs on real S3, made by `convmae shard`."""
    url = "s3://convmae/datasets/photographs"
    out, _ = convmae("shard", str(photographs), url, "--samples-per-shard", "40")
    assert f"{TILES} images in 3 shards (3 written, 0 kept), 1 sources skipped" in out
    return url


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
