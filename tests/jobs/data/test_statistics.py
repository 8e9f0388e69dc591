"""What data sets are measured to be, by tasks in threads of this process; by those of a cluster: test_datasets.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_data import STORAGE, labelled_dataset

from jobs.cluster.fan_out import Progress, fan_out_locally
from jobs.data.statistics import measure_dataset, measured_pixels
from pipeline.errors import DatasetError
from pipeline.image.channels import RGB_PIXELS
from pipeline.image.decode import decode
from pipeline.load.dataset import Dataset
from pipeline.shard.pixel_statistics import PixelStatistics


@pytest.fixture(params=[1, 3])
def in_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks in that many threads."""

    def runner(*args: Any, landmarks: Iterable[object], **options: Any) -> Iterator[Any]:
        run: Callable[..., Iterator[Any]] = partial(fan_out_locally, width=request.param)
        return run(*args, **options)

    monkeypatch.setattr("jobs.data.statistics.fan_out", runner)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return labelled_dataset(tmp_path, {"ant": 9, "bee": 8, "cat": 6})


def by_hand(dataset: Dataset, places: Iterable[int]) -> PixelStatistics:
    """In floating point, from the definition."""
    images = [decode(sample.data).reshape(-1, 3) / 255 for sample in dataset.read(list(places))]
    mean = np.mean([image.mean(0) for image in images], axis=0)
    square = np.mean([(image**2).mean(0) for image in images], axis=0)
    std = np.sqrt(square - mean**2)
    return PixelStatistics(len(images), tuple(mean.round(6).tolist()), tuple(std.round(6).tolist()))


def nothing(stage: str, progress: Progress) -> None:
    assert stage == "statistics"


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize(("samples", "places"), [(0, range(23)), (99, range(23)), (4, [0, 5, 11, 17])])
def test_a_data_set_is_measured_as_defined_from_all_images_or_some(
    dataset: Dataset, samples: int, places: Iterable[int]
) -> None:
    found = measure_dataset(STORAGE, dataset.url, samples=samples, on_progress=nothing)

    expected = by_hand(dataset, places)
    assert found.pixels.images == expected.images
    assert found.pixels.mean == pytest.approx(expected.mean, abs=2e-6)
    assert found.pixels.std == pytest.approx(expected.std, abs=2e-6)
    assert found.manifest == dataset.manifest, "nothing is written"


@pytest.mark.usefixtures("in_threads")
def test_progress_counts_shards_and_images(dataset: Dataset) -> None:
    seen: list[Progress] = []
    measured_pixels(
        STORAGE,
        dataset.url,
        dataset.manifest,
        pixels=RGB_PIXELS,
        samples=2,
        on_progress=lambda _, progress: seen.append(progress),
        landmarks=(),
    )

    assert (seen[0].done, seen[0].total) == (0, 2), "of three shards two hold a chosen image"
    assert (seen[-1].done, seen[-1].samples) == (2, 2)


@pytest.mark.usefixtures("in_threads")
def test_a_data_set_of_which_nothing_decodes_is_refused(dataset: Dataset) -> None:
    for entry in dataset.manifest.shards:
        path = Path(dataset.url, f"{entry.name}.tar")
        path.write_bytes(bytes(path.stat().st_size))

    with pytest.raises(DatasetError, match="must have an image that decodes"):
        measure_dataset(STORAGE, dataset.url, samples=0, on_progress=nothing)
