"""Fixtures of tests on the session's local stack: the command and a data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from testbed import TILES, Command

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
