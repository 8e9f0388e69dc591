"""Small labelled datasets of noise that is brighter in another quarter for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.source import Sources
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load.dataset import Dataset
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

STORAGE = Storage()
SIDE = 48


def picture(label: int, number: int) -> Image.Image:
    """One image of a class."""
    random = np.random.default_rng(1000 * label + number)
    pixels = random.integers(0, 120, (SIDE, SIDE + number % 5, 3))
    row, column = label // 2 % 2, label % 2
    pixels[row * 24 : row * 24 + 24, column * 24 : column * 24 + 24, label % 3] += 90 + 10 * (number % 4)
    return Image.fromarray(pixels.astype(np.uint8))


def labelled_dataset(
    folder: Path, classes: dict[str, int], *, samples_per_shard: int = 8, first: int = 0, has_labels: bool = True
) -> Dataset:
    """Make one.

    Args:
        folder: Where its images and shards go.
        classes: Images of each class.
        samples_per_shard: In a tar.
        first: Number of the first image; other images have other numbers.
        has_labels: Whether images lie in class folders.
    """
    for label, (name, count) in enumerate(classes.items()):
        place = folder / "images" / name if has_labels else folder / "images"
        place.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            picture(label, number).save(place / f"{name}-{number:03d}.jpg", quality=95)
    url = str(folder / "data")
    sources = find_sources(STORAGE, str(folder / "images"))
    assert isinstance(sources, Sources)
    tasks = plan_shards(sources, Sharding(samples_per_shard))
    reports = [write_shard(STORAGE, url, task) for task in tasks]
    Manifest.of(tasks, reports, sources.classes).save(STORAGE, url, [])
    return Dataset.open(STORAGE, url)
