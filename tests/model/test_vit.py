"""MAE, the baseline, from the same code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import Backbone, ConvMAE, ConvMAEConfig, ModelConfigError, WeightsError

MAE = ConvMAEConfig(image_size=64, embed_dim=(0, 0, 32), depth=(0, 0, 2), fusion=False)


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    """Inputs, weights and results of the official MAE."""
    return load_file(Path(__file__).parents[1] / "golden" / "mae_tiny.safetensors")


def loaded(official: dict[str, Tensor], dense: bool, **changes: object) -> ConvMAE:
    fields = {"image_size": 64, "embed_dim": MAE.embed_dim, "depth": MAE.depth, "fusion": False}
    model = ConvMAE(ConvMAEConfig(**{**fields, **changes}), dense=dense)  # type: ignore[arg-type]
    model.load_official({name.removeprefix("weight."): t for name, t in official.items() if name.startswith("weight.")})
    return model


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_mask_and_prediction_are_those_of_the_official_mae(
    official: dict[str, Tensor], norm_pix: bool, dense: bool
) -> None:
    model = loaded(official, dense, norm_pix=norm_pix)

    with torch.no_grad():
        out = model(official["input.imgs"], noise=official["input.noise"])
        prediction = model.reconstruct(official["input.imgs"], noise=official["input.noise"])

    expected = official[f"out.loss_mse_{'norm' if norm_pix else 'raw'}pix"].item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(out.mask, official["out.mask"])
    torch.testing.assert_close(prediction, official["out.pred"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_every_gradient_is_that_of_the_official_mae(official: dict[str, Tensor], dense: bool) -> None:
    model = loaded(official, dense)

    model(official["input.imgs"], noise=official["input.noise"]).loss.backward()

    found = {name.split(".", 1)[1]: p.grad for name, p in model.named_parameters() if p.requires_grad}
    expected = {name.removeprefix("grad."): value for name, value in official.items() if name.startswith("grad.")}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm(), name


def test_official_weights_make_the_round_trip_bit_for_bit(official: dict[str, Tensor]) -> None:
    exported = loaded(official, dense=False).official_state_dict()

    assert {f"weight.{name}" for name in exported} == {name for name in official if name.startswith("weight.")}
    assert all(torch.equal(value, official[f"weight.{name}"]) for name, value in exported.items())


def test_fresh_position_embeddings_are_those_of_the_official_mae(official: dict[str, Tensor]) -> None:
    fresh = ConvMAE(MAE).official_state_dict()

    for name in ("pos_embed", "decoder_pos_embed"):
        torch.testing.assert_close(fresh[name], official[f"weight.{name}"], rtol=0, atol=1e-7)


def test_mae_base_is_the_published_size() -> None:
    with torch.device("meta"):
        model = ConvMAE(ConvMAEConfig.preset("mae_base"))

    # Of mae_vit_base_patch16_dec512d8b: 111,907,840 parameters, frozen position embeddings among them.
    assert sum(parameter.numel() for parameter in model.parameters()) == 111_907_840


def test_there_are_no_feature_maps_to_be_had() -> None:
    with pytest.raises(ModelConfigError, match="embed_dim: must have convolution stages to give feature maps"):
        Backbone(MAE)
    with pytest.raises(ModelConfigError, match="embed_dim: must have convolution stages to give feature maps"):
        ConvMAE(MAE).encode_dense(torch.zeros(1, 3, 64, 64))


def test_weights_of_a_convmae_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"missing patch_embed\.proj\.weight.*unexpected stage1_output_decode"):
        ConvMAE(MAE).load_official(ConvMAE(ConvMAEConfig(image_size=64)).official_state_dict())
