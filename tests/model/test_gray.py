"""Gray images: what a model of one channel refuses, and weights of RGB models made into its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from model import Backbone, Classifier, ConvMAE, ConvMAEConfig, ModelConfigError, PooledEncoder
from model.weights import to_bands

CONVMAE = ConvMAEConfig(
    image_size=64, embed_dim=(8, 12, 16), num_heads=2, decoder_dim=16, decoder_num_heads=2, depth=(1, 1, 2)
)
MAE = dataclasses.replace(CONVMAE, embed_dim=(0, 0, 16), depth=(0, 0, 2), fusion=False)


def gray_images() -> Tensor:
    return torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(2))


def pair(config: ConvMAEConfig) -> tuple[ConvMAE, ConvMAE]:
    """A model for RGB, and the one for gray images that its weights make."""
    torch.manual_seed(0)
    colour = ConvMAE(config).eval()
    gray = ConvMAE(dataclasses.replace(config, in_channels=1)).eval()
    gray.load_state_dict(to_bands(colour.state_dict(), 1))
    return colour, gray


@pytest.mark.parametrize("config", [CONVMAE, MAE], ids=["convmae", "mae"])
def test_weights_made_gray_encode_a_gray_image_as_the_others_did_in_every_channel(config: ConvMAEConfig) -> None:
    colour, gray = pair(config)
    images, noise = gray_images(), torch.rand(3, config.mask_patches, generator=torch.Generator().manual_seed(3))

    with torch.no_grad():
        expected = colour.reconstruct(images.expand(-1, 3, -1, -1), noise=noise)
        found = gray.reconstruct(images, noise=noise)

    assert found.shape == (3, config.patches, 256)
    torch.testing.assert_close(found, expected.unflatten(2, (256, 3)).mean(3), rtol=1e-4, atol=1e-5)


def test_official_names_are_known_too() -> None:
    colour, gray = pair(CONVMAE)

    made = to_bands(colour.official_state_dict(), 1)

    assert made.keys() == gray.official_state_dict().keys()
    assert all(torch.equal(made[name], value) for name, value in gray.official_state_dict().items())


@pytest.mark.parametrize("config", [CONVMAE, MAE], ids=["convmae", "mae"])
def test_weights_for_more_bands_encode_an_image_whose_bands_are_alike_as_the_others_did(config: ConvMAEConfig) -> None:
    torch.manual_seed(0)
    colour = ConvMAE(config).eval()
    bands = ConvMAE(dataclasses.replace(config, in_channels=5)).eval()
    bands.load_state_dict(to_bands(colour.state_dict(), 5))
    images, noise = gray_images(), torch.rand(3, config.mask_patches, generator=torch.Generator().manual_seed(3))

    with torch.no_grad():
        expected = colour.reconstruct(images.expand(-1, 3, -1, -1), noise=noise)
        found = bands.reconstruct(images.expand(-1, 5, -1, -1), noise=noise)

    mean = expected.unflatten(2, (256, 3)).mean(3, keepdim=True).expand(-1, -1, -1, 5).flatten(2)
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-5)


def test_gray_weights_stay_as_they_are() -> None:
    state = ConvMAE(dataclasses.replace(CONVMAE, in_channels=1)).state_dict()

    assert all(torch.equal(value, state[name]) for name, value in to_bands(state, 1).items())


@pytest.mark.parametrize("kind", ["convmae", "backbone", "pooled", "classifier"])
def test_images_of_other_channels_are_refused(kind: str) -> None:
    config = dataclasses.replace(CONVMAE, in_channels=1)
    images = gray_images().expand(-1, 3, -1, -1)
    calls = {
        "convmae": lambda: ConvMAE(config)(images, noise=torch.rand(3, config.mask_patches)),
        "backbone": lambda: Backbone(config)(images),
        "pooled": lambda: PooledEncoder(config)(images),
        "classifier": lambda: Classifier(config, 2)(images),
    }

    with pytest.raises(ModelConfigError, match=r"images: must have shape \(batch, 1, .*got \(3, 3, 64, 64\)"):
        calls[kind]()


def test_the_encoder_alone_takes_gray_images() -> None:
    config = dataclasses.replace(CONVMAE, in_channels=1)

    with torch.no_grad():
        assert Backbone(config)(gray_images()).stage3.shape == (3, 16, 4, 4)
        assert PooledEncoder(config)(gray_images()).shape == (3, 16)
        assert Classifier(config, 5)(gray_images()).shape == (3, 5)
