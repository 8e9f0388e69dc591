from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

from pipeline.shard.pixel_statistics import PixelStatistics, PixelSums, spread_places


def noise(seed: int, shape: tuple[int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 200, shape, np.uint8)


def summed(images: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]) -> PixelSums:
    return functools.reduce(operator.add, map(PixelSums.of, images))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_statistics_are_those_of_the_definition(channels: int) -> None:
    images = [noise(seed, (20, 30, channels)) // (1 + seed) for seed in range(5)]
    whole = np.stack(images).astype(np.float64) / 255

    found = summed(images).statistics()

    assert found.images == 5 and found.channels == channels
    np.testing.assert_allclose(found.mean, whole.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found.std, whole.std((0, 1, 2)), atol=1e-6)


def test_every_image_counts_the_same_whatever_its_size() -> None:
    white, black = np.full((100, 100, 1), 255, np.uint8), np.zeros((3, 2, 1), np.uint8)

    assert summed([white, black]).statistics() == PixelStatistics(2, (0.5,), (0.5,))


def test_no_bit_depends_on_how_images_were_dealt_to_tasks() -> None:
    images = [noise(seed, (17 + seed, 13, 3)) for seed in range(40)]
    one = summed(images)

    for parts in (2, 7, 40):
        dealt = [summed(images[part::parts]) for part in range(parts)]
        assert functools.reduce(operator.add, dealt[::-1]) == one


def test_images_of_one_colour_do_not_lead_to_a_division_by_zero() -> None:
    found = summed([np.full((4, 4, 3), 51, np.uint8)] * 3).statistics()

    assert found.mean == (0.2, 0.2, 0.2)
    assert found.std == (round(1 / 255, 6),) * 3


def test_statistics_are_read_as_they_were_written() -> None:
    found = summed([noise(1, (9, 9, 3))]).statistics()

    assert PixelStatistics.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (10, 0, list(range(10))),
        (10, 10, list(range(10))),
        (10, 99, list(range(10))),
        (10, 4, [0, 2, 5, 7]),
        (3, 1, [0]),
    ],
)
def test_places_are_equally_far_apart(total: int, count: int, expected: list[int]) -> None:
    assert spread_places(total, count).tolist() == expected


def test_places_of_many_samples_are_distinct_and_ascend() -> None:
    places = spread_places(2_000_000_000, 10_000)

    assert len(places) == 10_000 and np.all(np.diff(places) == 200_000)
