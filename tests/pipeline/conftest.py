from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.access.s3_options import OBSTORE, S3FS
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load.dataset import Dataset
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

MakeJpeg = Callable[..., bytes]


@pytest.fixture(scope="module", params=[S3FS, OBSTORE])
def reader(request: pytest.FixtureRequest) -> str:
    """Each of what can read the bodies of S3 objects."""
    if request.param == OBSTORE:
        pytest.importorskip("obstore")
    return str(request.param)


@pytest.fixture(scope="session")
def jpeg() -> MakeJpeg:
    """Bytes of a smooth colour image that depends on a number."""

    def make(number: int, height: int = 40, width: int = 56, **options: object) -> bytes:
        rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
        waves = [np.sin(6 * (rows * (number % 5 + 1) + columns * (c + 1) + number)) for c in range(3)]
        pixels = (127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)
        output = io.BytesIO()
        Image.fromarray(pixels).save(output, "JPEG", **{"quality": 90} | options)
        return output.getvalue()

    return make


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory, jpeg: MakeJpeg) -> Path:
    """61 images of various sizes in three class folders."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(61):
        path = folder / f"class-{'bca'[number % 3]}" / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(number, 32 + number % 9, 40 + number % 13))
    return folder


def make_dataset(storage: Storage, source: str, url: str, samples_per_shard: int) -> Dataset:
    sources = find_sources(storage, source)
    tasks = plan_shards(sources, Sharding(samples_per_shard))
    reports = [write_shard(storage, url, task) for task in tasks]
    Manifest.of(tasks, reports, sources.classes).save(storage, url, [])
    return Dataset.open(storage, url)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Dataset:
    """The photographs in five shards; for reading only."""
    return make_dataset(Storage(), str(photographs), str(tmp_path_factory.mktemp("dataset")), 13)


@pytest.fixture
def own_dataset(tmp_path: Path, photographs: Path) -> Dataset:
    """The same, for a test that damages it."""
    return make_dataset(Storage(), str(photographs), str(tmp_path / "dataset"), 13)
