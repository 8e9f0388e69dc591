"""Batches of data sets whose images have restart markers."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.image import decode_crop as decode_crop_module
from pipeline.image.augment import Augmentation, RandomCrops
from pipeline.image.decode import decode, decode_jpeg
from pipeline.image.rand_augment import RandAugmented
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load import image_maker
from pipeline.load.batch import Batch
from pipeline.load.dataset import Dataset
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.shard.manifest import Manifest
from pipeline.shard.pixel_statistics import PixelStatistics
from pipeline.store.storage import Storage

SAMPLES = 24
ORDER = Order(SAMPLES, global_batch_size=8, lanes=2, seed=5, block_samples=3, window_blocks=2)
SIDE = 16


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """JPEGs with restart markers, of some kinds, and some other images; the manifest says nothing of markers."""
    photos, url = tmp_path_factory.mktemp("photos"), str(tmp_path_factory.mktemp("dataset"))
    random = np.random.default_rng(0)
    for number in range(SAMPLES):
        height, width = 100 + number, 128 - number % 3
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        options: dict[str, Any] = {"subsampling": number % 3, "restart_marker_blocks": 4}
        kind = ("JPEG", "PNG")[number % 8 == 7]
        if number % 8 == 6:
            options = {"progressive": True}
        image.convert("L" if number % 8 == 5 else "RGB").save(photos / f"{number:02d}.jpg", kind, **options)
    sources = find_sources(Storage(), str(photos))
    tasks = plan_shards(sources, Sharding(10))  # type: ignore[arg-type]
    reports = [write_shard(Storage(), url, task) for task in tasks]
    Manifest.of(tasks, reports, ()).measured(PixelStatistics(9, (0.5,) * 3, (0.2,) * 3)).save(Storage(), url, [])
    return Dataset.open(Storage(), url)


@pytest.fixture(scope="module")
def marked(plain: Dataset) -> Dataset:
    """The same data set, with a manifest that vouches for the markers."""
    return Dataset(Storage(), plain.url, plain.manifest.marked())


def batches(dataset: Dataset, augmentation: Augmentation | None = None, channels: int = 3) -> list[Batch]:
    loader = Loader(
        dataset,
        ORDER,
        image_shape=(SIDE, SIDE),
        channels=channels,
        rank=0,
        world_size=1,
        seed=5,
        threads=2,
        augmentation=augmentation,
    )
    return list(loader.batches(0, 3 * ORDER.steps_per_epoch))


@pytest.fixture
def whole_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each image that is decoded whole."""
    seen: list[int] = []

    def noting(data: bytes, *words: int) -> Any:
        seen.append(len(data))
        return decode(data, *words)

    monkeypatch.setattr(image_maker, "decode", noting)
    return seen


@pytest.mark.parametrize("augmentation", [None, RandAugmented(RandomCrops((0.08, 1.0)))])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_the_same_and_most_images_are_decoded_in_part(
    plain: Dataset,
    marked: Dataset,
    augmentation: Augmentation | None,
    channels: int,
    whole_decodes: list[int],
) -> None:
    expected = batches(plain, augmentation, channels)
    images = sum(len(batch.images) for batch in expected)
    assert len(whole_decodes) == images
    whole_decodes.clear()

    found = batches(marked, augmentation, channels)

    assert len(whole_decodes) < images / 2
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert np.array_equal(ours.crops, theirs.crops)


def test_what_markers_lie_about_is_read_as_without_them(
    marked: Dataset, plain: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that refuses every part."""

    def refuse(*_: Any) -> None:
        raise ValueError("Corrupt JPEG data")

    monkeypatch.setattr(decode_crop_module, "decode_jpeg", refuse)

    for ours, theirs in zip(batches(marked), batches(plain), strict=True):
        assert torch.equal(ours.images, theirs.images)


def test_scaled_decoding_gives_nearly_the_same_images_with_markers_and_without(plain: Dataset, marked: Dataset) -> None:
    exact = batches(plain)
    scaled = batches(plain, RandomCrops(scaled_decode=True))
    in_part = batches(marked, RandomCrops(scaled_decode=True))

    for ours, theirs, whole in zip(in_part, scaled, exact, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert np.array_equal(ours.crops, theirs.crops)
        assert np.abs(ours.crops - whole.crops).max() <= 8
        assert not torch.equal(theirs.images, whole.images)


def test_a_scaled_photograph_is_near_to_the_exact_one() -> None:
    rows, columns = np.mgrid[0:1200, 0:1600] / 1600
    waves = [127.5 + 90 * np.sin(40 * (rows * (c + 1) + columns)) + 30 * np.sin(300 * columns) for c in range(3)]
    output = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(output, "JPEG", quality=92)
    data, exact, scaled = output.getvalue(), RandomCrops(), RandomCrops(scaled_decode=True)
    for row in exact.draws(1, 0, np.arange(6)):
        crop = exact.crop(row, 1200, 1600)
        found = decode_crop_module.decode_crop(
            data,
            3,
            lambda *_, crop=crop: crop,
            is_marked=False,
            least_shape=(224, 224),  # type: ignore[misc]
        )
        assert found is not None and max(found[0].shape) <= max(crop.height, crop.width) / 2 + 1
        shown, moved = found
        assert np.abs(np.array([crop.top - moved.top, crop.left - moved.left])).max() <= 4
        whole = exact.image(moved.of(decode(data)), moved, row, (224, 224))
        difference = np.abs(scaled.image(shown, moved, row, (224, 224)).astype(int) - whole)
        assert 0 < difference.mean() < 2


def test_shrinking_rounds_sizes_up(tmp_path: Path) -> None:
    output = io.BytesIO()
    Image.new("RGB", (101, 67), "red").save(output, "JPEG")

    assert [decode_jpeg(output.getvalue(), 3, by).shape[:2] for by in (1, 2, 4, 8)] == [
        (67, 101),
        (34, 51),
        (17, 26),
        (9, 13),
    ]


def test_a_data_set_in_another_place_keeps_its_markers(marked: Dataset, tmp_path: Path) -> None:
    marked.manifest.save(Storage(), str(tmp_path), [])

    assert Dataset.open(Storage(), str(tmp_path)).manifest.restart_markers
    assert not replace(marked.manifest, restart_markers=False, format_version=3).restart_markers
