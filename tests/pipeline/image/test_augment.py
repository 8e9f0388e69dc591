from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.image.augment import Crop, augmented, center_crop, crop_draws, random_crop
from pipeline.image.decode import decode, resize

SHAPES = [(375, 500), (500, 333), (64, 64), (20, 900), (900, 20), (1, 1), (1, 40)]


def crop_of(seed: int, epoch: int, sample: int, height: int, width: int) -> Crop:
    return random_crop(crop_draws(seed, epoch, np.array([sample]))[0], height, width)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_crops_lie_inside_the_image(height: int, width: int) -> None:
    for sample in range(300):
        crop = crop_of(0, 0, sample, height, width)
        assert crop.top >= 0 and crop.left >= 0 and crop.height >= 1 and crop.width >= 1
        assert crop.top + crop.height <= height and crop.left + crop.width <= width


def test_crops_follow_the_recipe() -> None:
    height, width = 375, 500
    crops = [crop_of(0, 3, sample, height, width) for sample in range(3000)]
    areas = np.array([crop.height * crop.width for crop in crops]) / (height * width)
    ratios = np.array([crop.width / crop.height for crop in crops])

    assert areas.min() > 0.19 and areas.max() <= 1.0
    assert areas.min() < 0.22 and areas.max() > 0.9
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    assert abs(np.mean([crop.flip for crop in crops]) - 0.5) < 5 * 0.5 / np.sqrt(len(crops))
    lefts = np.array([crop.left / (width - crop.width) for crop in crops if crop.width < width])
    assert abs(lefts.mean() - 0.5) < 0.03


def test_a_crop_depends_on_seed_epoch_and_sample_alone() -> None:
    assert crop_of(1, 2, 3, 100, 100) == crop_of(1, 2, 3, 100, 100)
    others = [crop_of(*key, 100, 100) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]]
    assert len(set(others)) == len(others)


def test_a_crop_is_the_same_whatever_it_is_drawn_with() -> None:
    samples = np.array([7, 0, 2_000_000_000, 7])

    together = [random_crop(draws, 375, 500) for draws in crop_draws(1, 2, samples)]

    assert together == [crop_of(1, 2, sample, 375, 500) for sample in samples.tolist()]


def test_crops_stay_those_that_runs_were_begun_with() -> None:
    crops = [crop_of(0, epoch, sample, 375, 500) for epoch, sample in ((0, 0), (3, 17), (1599, 1_281_166))]

    assert crops == [
        Crop(17, 107, 262, 309, flip=True),
        Crop(5, 0, 327, 344, flip=False),
        Crop(25, 4, 319, 324, flip=True),
    ]


def test_pixels_are_within_rounding_of_pil_bicubic(jpeg: Callable[..., bytes]) -> None:
    differences = []
    for sample in range(12):
        pixels = decode(jpeg(sample, 375, 500))
        crop = crop_of(0, 0, sample, 375, 500)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        expected = np.asarray(Image.fromarray(pixels).crop(box).resize((224, 224), Image.Resampling.BICUBIC))
        expected = expected[:, ::-1] if crop.flip else expected
        differences.append(np.abs(augmented(pixels, crop, (224, 224)).transpose(1, 2, 0).astype(int) - expected))

    assert np.mean(differences) < 0.5
    assert np.max(differences) <= 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("width", [32, 31, 8, 1])
def test_flip_mirrors_left_and_right(jpeg: Callable[..., bytes], channels: int, width: int) -> None:
    pixels = decode(jpeg(1), channels)
    plain, mirrored = (augmented(pixels, Crop(2, 3, 30, 40, flip=flip), (32, width)) for flip in (False, True))

    assert np.array_equal(mirrored, plain[:, :, ::-1])
    assert width == 1 or not np.array_equal(mirrored, plain)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_center_crop_takes_the_middle(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2

    result = center_crop(pixels, (side, side))

    assert np.array_equal(result.transpose(1, 2, 0), pixels[top : top + side, left : left + side])


def test_decode_turns_gray_into_three_equal_channels() -> None:
    output = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(output, "JPEG")

    pixels = decode(output.getvalue())

    assert pixels.shape == (8, 8, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_decode_refuses_a_truncated_image(jpeg: Callable[..., bytes]) -> None:
    with pytest.raises(ValueError, match="Premature end"):
        decode(jpeg(0)[:-200])


def test_resize_works_on_a_single_pixel() -> None:
    assert resize(np.full((1, 1, 3), 7, np.uint8), 4, 4).tolist() == np.full((3, 4, 4), 7).tolist()
