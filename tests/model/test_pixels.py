from __future__ import annotations

import torch

from model import denormalise, normalise
from model.pixels import IMAGENET_MEAN, IMAGENET_STD, patch_moments, patchify, unpatchify


def test_normalise_is_imagenets_mean_and_deviation() -> None:
    grey = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)

    result = normalise(grey)

    assert result.dtype == torch.float32
    for channel in range(3):
        expected = (51 / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(result[:, channel], torch.full((2, 4, 4), expected))


def test_denormalise_takes_back_every_value() -> None:
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)

    assert torch.equal(denormalise(normalise(every_value)), every_value)


def test_denormalise_clips_what_no_pixel_can_be() -> None:
    assert denormalise(torch.full((1, 3, 1, 1), 9.0)).flatten().tolist() == [255] * 3
    assert denormalise(torch.full((1, 3, 1, 1), -9.0)).flatten().tolist() == [0] * 3


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
