"""RandAugment: operations against pixels worked out by hand, and draws against their distribution."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.image.augment import Augmentation, Draws, RandomCrops
from pipeline.image.decode import Pixels
from pipeline.image.rand_augment import FILL, MOST, OPERATIONS, Operation, RandAugmented


def gray(*values: int) -> Image.Image:
    return Image.fromarray(np.repeat(np.array([values], np.uint8)[:, :, None], 3, axis=2))


def made(name: str, magnitude: float, sign: float, image: Image.Image) -> list[int]:
    return np.asarray(Operation(name, magnitude, sign).applied(image))[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("name", "magnitude", "expected"),
    [
        ("invert", 9.0, [255, 155, 55, 0]),
        ("posterize", 9.0, [0, 0, 128, 128]),  # 4 - int(3.6) = 1 bit
        ("posterize", 0.0, [0, 96, 192, 240]),  # 4 bits
        ("solarize", 9.0, [0, 155, 55, 0]),  # from 256 - 230 = 26 upwards
        ("solarize", 0.0, [0, 100, 200, 255]),
        ("solarize_add", 5.0, [55, 155, 200, 255]),  # 55 below 128
        ("autocontrast", 5.0, [0, 100, 200, 255]),
        ("translate_x", 10.0, [100, 200, 255, FILL[0]]),  # 0.45 * 4 = 1.8 pixels: see below
    ],
)
def test_operations_are_those_of_the_official_fine_tuning(name: str, magnitude: float, expected: list[int]) -> None:
    if name == "translate_x":  # whole pixels, so that no interpolation is in the way
        magnitude = MOST / (0.45 * 4)
    assert made(name, magnitude, 1.0, gray(0, 100, 200, 255)) == expected


def test_strength_grows_with_magnitude_to_both_sides() -> None:
    assert made("brightness", 10.0, -1.0, gray(0, 100, 200, 250)) == [0, 10, 20, 25]
    assert made("brightness", 5.0, 1.0, gray(0, 20, 40, 60)) == [0, 29, 58, 87]
    assert made("contrast", 10.0, -1.0, gray(0, 100, 100, 200)) == [90, 100, 100, 110]
    turned = np.asarray(Operation("rotate", 10.0, 1.0).applied(Image.new("RGB", (9, 9), (255, 255, 255))))
    assert turned[4, 4].tolist() == [255, 255, 255]
    assert np.abs(turned[0, 0].astype(int) - FILL).max() < 60


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@pytest.mark.parametrize("magnitude", [0.0, 9.0, MOST])
def test_each_takes_any_magnitude_and_keeps_the_size(name: str, magnitude: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8))
    for sign in (-1.0, 1.0):
        assert Operation(name, magnitude, sign).applied(image).size == (23, 17)


def test_draws_have_the_published_distribution() -> None:
    augmentation = RandAugmented(RandomCrops((0.08, 1.0)), operations=2, magnitude=9.0)
    rows = augmentation.draws(1, 0, np.arange(6000))
    chosen = [augmentation.chosen(row[41:]) for row in rows]

    counts = Counter(len(operations) for operations in chosen)
    assert [counts[number] / 6000 for number in (0, 1, 2)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    every = [operation for operations in chosen for operation in operations]
    names = Counter(operation.name for operation in every)
    assert len(names) == 15
    assert max(names.values()) < 1.25 * len(every) / 15
    magnitudes = np.array([operation.magnitude for operation in every])
    assert np.median(magnitudes) == pytest.approx(9.0, abs=0.05)
    assert (magnitudes == MOST).mean() == pytest.approx(0.0228, abs=0.01)  # above two deviations
    assert np.percentile(magnitudes, 16) == pytest.approx(8.5, abs=0.05)
    assert np.mean([operation.sign for operation in every]) == pytest.approx(0.0, abs=0.05)


def shown(augmentation: Augmentation, pixels: Pixels, draws: Draws, image_shape: tuple[int, int]) -> Pixels:
    crop = augmentation.crop(draws, *pixels.shape[:2])
    return augmentation.image(crop.of(pixels), crop, draws, image_shape)


def test_an_image_depends_on_seed_epoch_and_sample_alone() -> None:
    augmentation = RandAugmented(RandomCrops((0.08, 1.0)))
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
    samples = np.array([4, 7, 1])

    def images(seed: int, epoch: int, of: np.ndarray) -> list[np.ndarray]:  # type: ignore[type-arg]
        return [shown(augmentation, pixels, row, (24, 32)) for row in augmentation.draws(seed, epoch, of)]

    together, alone = images(1, 0, samples), images(1, 0, samples[1:2])
    assert np.array_equal(together[1], alone[0])
    assert together[1].shape == (3, 24, 32) and together[1].dtype == np.uint8
    assert not np.array_equal(together[1], images(1, 1, samples)[1])
    assert not np.array_equal(together[1], images(2, 0, samples)[1])


def test_without_operations_the_crop_is_left() -> None:
    crops = RandomCrops((0.08, 1.0))
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
    (row,) = crops.draws(1, 0, np.array([5]))

    augmentation = RandAugmented(crops, operations=0)

    assert np.array_equal(shown(augmentation, pixels, row, (16, 16)), shown(crops, pixels, row, (16, 16)))
    assert augmentation.crop(row, 40, 50) == crops.crop(row, 40, 50)


def test_operations_do_not_change_what_is_cropped() -> None:
    crops = RandomCrops((0.08, 1.0))
    augmentation = RandAugmented(crops)
    (row,), (alone,) = (each.draws(1, 0, np.array([5])) for each in (augmentation, crops))

    assert augmentation.crop(row, 40, 50) == crops.crop(alone, 40, 50)
