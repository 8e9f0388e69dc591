from __future__ import annotations

import pytest
import torch

from model import ChannelStatistics, denormalise, normalise
from model.pixels import patch_moments, patchify, unpatchify

STATISTICS = ChannelStatistics((0.485, 0.25, 0.406), (0.229, 0.5, 0.225))


def test_normalise_takes_mean_and_deviation_of_each_channel() -> None:
    grey = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)

    result = normalise(grey, STATISTICS)

    assert result.dtype == torch.float32
    for channel in range(3):
        expected = (51 / 255 - STATISTICS.mean[channel]) / STATISTICS.std[channel]
        torch.testing.assert_close(result[:, channel], torch.full((2, 4, 4), expected))


def test_denormalise_takes_back_every_value() -> None:
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)

    assert torch.equal(denormalise(normalise(every_value, STATISTICS), STATISTICS), every_value)


def test_denormalise_clips_what_no_pixel_can_be() -> None:
    assert denormalise(torch.full((1, 3, 1, 1), 9.0), STATISTICS).flatten().tolist() == [255] * 3
    assert denormalise(torch.full((1, 3, 1, 1), -9.0), STATISTICS).flatten().tolist() == [0] * 3


def test_a_patch_is_laid_out_row_column_channel() -> None:
    images = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).view(2, 3, 32, 48)

    patches = patchify(images)

    assert patches.shape == (2, 6, 768)
    second_row_third_column = images[1, :, 16:32, 32:48]
    assert torch.equal(patches[1, 5].view(16, 16, 3), second_row_third_column.permute(1, 2, 0))


def test_unpatchify_is_the_inverse_of_patchify() -> None:
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))

    assert torch.equal(unpatchify(patchify(images), (2, 3)), images)


def test_patch_moments_make_a_patch_standard() -> None:
    patches = 5 + 3 * torch.randn(2, 4, 768, generator=torch.Generator().manual_seed(0))

    mean, deviation = patch_moments(patches)
    standard = (patches - mean) / deviation

    assert mean.shape == deviation.shape == (2, 4, 1)
    torch.testing.assert_close(standard.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(-1), torch.ones(2, 4))
    assert torch.isfinite(torch.zeros(1, 1, 768) / patch_moments(torch.zeros(1, 1, 768))[1]).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_patches_of_any_channels_become_images_again(channels: int) -> None:
    images = torch.randn(2, channels, 32, 48, generator=torch.Generator().manual_seed(0))

    patches = patchify(images)

    assert patches.shape == (2, 6, 256 * channels)
    assert torch.equal(unpatchify(patches, (2, 3)), images)


def test_gray_images_are_normalised_by_one_mean_and_deviation() -> None:
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    gray = ChannelStatistics((0.5,), (0.25,))

    result = normalise(every_value, gray)

    torch.testing.assert_close(result.flatten()[[0, 255]], torch.tensor([-2.0, 2.0]))
    assert torch.equal(denormalise(result, gray), every_value)


def test_16_bits_are_normalised_as_shares_of_their_largest_value() -> None:
    values = torch.tensor([0, 1, 1311, 65535], dtype=torch.int32).to(torch.uint16).view(1, 1, 2, 2)

    found = normalise(values, ChannelStatistics((0.02,), (0.01,))).flatten().double()

    expected = (torch.tensor([0.0, 1.0, 1311.0, 65535.0], dtype=torch.float64) / 65535 - 0.02) / 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
