"""Pooled features against the official encoder's own tokens, and against hand-made forwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from model import ConvMAE, ConvMAEConfig, ModelConfigError, PooledEncoder, WeightsError
from model.masking import all_patches

SMALL = ConvMAEConfig(
    image_size=(64, 96), embed_dim=(8, 12, 16), num_heads=2, decoder_dim=16, decoder_num_heads=2, depth=(1, 2, 2)
)
MAE = dataclasses.replace(SMALL, embed_dim=(0, 0, 16), depth=(0, 0, 3), fusion=False)


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def loaded(config: ConvMAEConfig) -> tuple[ConvMAE, PooledEncoder]:
    torch.manual_seed(0)
    model, pooled = ConvMAE(config).eval(), PooledEncoder(config).eval()
    pooled.load(model.state_dict())
    return model, pooled


def standardised(x: Tensor) -> Tensor:
    """A LayerNorm that nothing has trained, written out."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def test_features_are_the_normed_mean_of_the_official_tokens(
    golden: dict[str, Tensor], official_weights: dict[str, Tensor]
) -> None:
    pooled = PooledEncoder(ConvMAEConfig()).eval()
    pooled.load(official_weights)

    with torch.no_grad():
        found = pooled(golden["input.imgs"])

    expected = standardised(golden["dense.stage3_tokens"].double().mean(1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, MAE, dataclasses.replace(SMALL, masking="random")], ids=str)
def test_features_are_those_of_the_pretraining_encoder_that_sees_every_patch(config: ConvMAEConfig) -> None:
    model, pooled = loaded(dataclasses.replace(config, fusion=False))
    model.encoder.norm = torch.nn.Identity()
    draws = all_patches(2, config.mask_patches, torch.device("cpu"))

    with torch.no_grad():
        found, tokens = pooled(images(64, 96)), model.encoder(images(64, 96), draws)

    torch.testing.assert_close(found, standardised(tokens[:, config.class_tokens :].mean(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, MAE], ids=["ConvMAE", "MAE"])
def test_an_image_of_a_constant_colour_has_like_features_at_twice_the_size(config: ConvMAEConfig) -> None:
    """Without positions every inner patch is alike; what differs is the share of patches at the border."""
    _, pooled = loaded(dataclasses.replace(config, position="none"))
    plain = torch.full((1, 3, 64, 96), 0.5)

    with torch.no_grad():
        small, large = pooled(plain), pooled(plain.repeat(1, 1, 2, 2))

    assert torch.nn.functional.cosine_similarity(small, large).item() > 0.99


@pytest.mark.parametrize("config", [SMALL, MAE], ids=["ConvMAE", "MAE"])
def test_positions_are_interpolated_to_another_size(config: ConvMAEConfig) -> None:
    _, pooled = loaded(config)

    with torch.no_grad():
        found = pooled(images(128, 32, count=3))

    assert found.shape == (3, 16)
    assert found.isfinite().all()


def test_official_names_and_ours_load_alike_and_another_architecture_is_refused() -> None:
    model, ours = loaded(SMALL)
    official = PooledEncoder(SMALL).eval()
    official.load(model.official_state_dict() | {"head.bias": torch.zeros(3)})

    with torch.no_grad():
        assert torch.equal(ours(images(64, 96)), official(images(64, 96)))
    with pytest.raises(WeightsError, match=r"missing blocks2\.1"):
        ours.load(ConvMAE(dataclasses.replace(SMALL, depth=(1, 1, 2))).state_dict())


@pytest.mark.parametrize("shape", [(3, 64, 96), (1, 1, 64, 96), (1, 3, 64, 90)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelConfigError, match="multiples of 16"):
        PooledEncoder(SMALL)(torch.zeros(shape))
