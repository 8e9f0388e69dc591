"""Data sets whose images are read as gray: one channel, of the same bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.image.augment import RandomCrops
from pipeline.image.channels import PixelKind
from pipeline.image.decode import decode
from pipeline.image.rand_augment import GRAY_FILL, OPERATIONS, Operation, RandAugmented
from pipeline.ingest.plan import Ingest, Sharding
from pipeline.ingest.sources import find_sources
from pipeline.load.center_crops import center_crops
from pipeline.load.dataset import Dataset
from pipeline.load.loader import Loader
from pipeline.load.pixel_sums import PixelTask, shard_sums
from pipeline.order.sample_order import Order
from pipeline.shard.manifest import Manifest
from pipeline.shard.pixel_statistics import PixelStatistics
from pipeline.store.storage import Storage


def image(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)  # type: ignore[arg-type]
    return data.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_coloured_images_are_read_as_their_brightness(kind: str) -> None:
    data = saved(image("RGB"), kind, **({"lossless": True} if kind == "WEBP" else {}))

    found = decode(data, 1)

    assert found.shape == (24, 32, 1) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[..., 0], np.asarray(image("RGB").convert("L")))


def test_a_jpeg_is_read_as_its_brightness_without_a_detour_by_rgb() -> None:
    data = saved(image("RGB"), "JPEG", quality=95)

    found = decode(data, 1)[..., 0].astype(int)

    with Image.open(io.BytesIO(data)) as opened:
        opened.draft("L", opened.size)
        np.testing.assert_array_equal(found, np.asarray(opened.convert("L")).astype(int))
    by_rgb = np.asarray(Image.fromarray(decode(data)).convert("L")).astype(int)
    assert np.abs(found - by_rgb).mean() < 1.5


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 90}), ("PNG", {}), ("TIFF", {})])
def test_gray_images_are_the_same_in_every_channel(kind: str, options: dict[str, object]) -> None:
    data = saved(image("L"), kind, **options)

    gray, colour = decode(data, 1), decode(data)

    assert gray.shape == (24, 32, 1)
    np.testing.assert_array_equal(colour, np.repeat(gray, 3, axis=2))


def test_a_loader_gives_one_channel_that_crops_and_flips_like_three(tmp_path: Path, dataset: Dataset) -> None:
    order = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)

    def first(channels: int) -> torch.Tensor:
        loader = Loader(
            dataset, order, image_shape=(16, 16), channels=channels, rank=0, world_size=1, seed=5, threads=2
        )
        (batch,) = loader.batches(0, 1)
        return batch.images

    gray, colour = first(1), first(3)

    assert gray.shape == (12, 1, 16, 16) and gray.dtype == torch.uint8
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert ((colour.float() * weights).sum(1) - gray[:, 0].float()).abs().mean() < 2


def test_evaluation_reads_gray_too(dataset: Dataset) -> None:
    (crops,) = center_crops(dataset, [np.arange(5)], (16, 16), threads=1, channels=1)

    assert crops.shape == (5, 1, 16, 16)


def test_gray_images_are_measured_in_one_channel(dataset: Dataset) -> None:
    found = shard_sums(Storage(), dataset.url, PixelTask(dataset.manifest.shards[0], (0, 1, 2), PixelKind(1)))

    images = [decode(sample.data, 1) / 255 for sample in dataset.read([0, 1, 2])]
    assert found.statistics().mean == pytest.approx((np.mean([each.mean() for each in images]),), abs=1e-6)


def test_the_same_images_as_gray_are_another_data_set(photographs: Path, dataset: Dataset, tmp_path: Path) -> None:
    sources = find_sources(Storage(), str(photographs))
    colour, gray = (Ingest(sources, Sharding(13), channels) for channels in (3, 1))
    measured = dataset.manifest.measured(PixelStatistics(9, (0.5,), (0.25,)))
    measured.save(Storage(), str(tmp_path), [])

    assert colour.digest == Ingest(sources, Sharding(13)).digest != gray.digest
    assert Manifest.load(Storage(), str(tmp_path)).channels == 1


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0.0, 5.0, 10.0])
def test_an_operation_does_to_gray_what_it_does_to_each_equal_channel(name: str, magnitude: float) -> None:
    gray = image("L")
    operation = Operation(name, magnitude, -1.0)

    found = np.asarray(operation.applied(gray)).astype(int)
    colour = np.asarray(operation.applied(gray.convert("RGB"))).astype(int)

    assert found.shape == (24, 32)
    inside = (colour == colour[..., :1]).all(-1)  # what comes into view from outside is no gray there
    assert inside.mean() > 0.3
    assert np.abs(found - colour[..., 0])[inside].max() <= 1


def test_gray_images_are_augmented_to_gray_ones() -> None:
    augmentation = RandAugmented(RandomCrops(), operations=2, magnitude=9.0)
    draws = augmentation.draws(0, 0, np.arange(40))

    for row in draws:
        crop = augmentation.crop(row, 24, 32)
        out = augmentation.image(crop.of(np.full((24, 32, 1), GRAY_FILL, np.uint8)), crop, row, (16, 16))
        assert out.shape == (1, 16, 16)
