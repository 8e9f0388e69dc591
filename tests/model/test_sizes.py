"""Images of another size than the model's: the same as a model of that size whose positions were interpolated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small_models import batch, seeded, small
from torch import Tensor
from torch.nn import functional

from model import ConvMAE, ConvMAEConfig, ModelConfigError, mask_noise
from model.position import interpolated, sincos_position

OTHER = (48, 160)
MAE = {"embed_dim": (0, 0, 16), "depth": (0, 0, 2), "fusion": False}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"masking": "random", "loss": "l1"},
    {"position": "learned", "norm_pix": False},
    {"position": "none", "kernel_size": 7},
    {"views": 3, "mask_ratio": 2 / 3},
    {"in_channels": 1, "decoder_depth": 1},
    {**MAE},
    {**MAE, "position": "learned"},
]


def bicubic(position: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """By PyTorch's own function, in float32."""
    maps = position.view(1, *grid, -1).permute(0, 3, 1, 2)
    return functional.interpolate(maps, wanted, mode="bicubic", align_corners=False).flatten(2).mT


def both(config: ConvMAEConfig, dense: bool = False) -> tuple[ConvMAE, ConvMAE]:
    """A model that takes images of OTHER, too, and one of that size with the same weights."""
    own = ConvMAE(config, dense=dense, other_sizes=[OTHER])
    own.load_state_dict(seeded(config).state_dict())
    other = ConvMAE(dataclasses.replace(config, image_size=OTHER), dense=dense)
    state, ahead = dict(own.state_dict()), config.class_tokens
    for name in ("encoder.pos_embed", "decoder.decoder_pos_embed"):
        patches = bicubic(state[name][:, ahead:], config.grid, other.config.grid)
        state[name] = torch.cat([state[name][:, :ahead], patches], dim=1)
    other.load_state_dict(state)
    return own, other


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_mask_and_gradients_are_those_of_a_model_of_that_size(changes: dict[str, Any], dense: bool) -> None:
    own, other = both(small(**changes), dense)
    images, noise = batch(other.config)

    found, expected = own(images, noise=noise), other(images, noise=noise)
    found.loss.backward()
    expected.loss.backward()

    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert torch.equal(found.mask, expected.mask)
    gradients = {name: value.grad for name, value in other.named_parameters() if "pos_embed" not in name}
    for name, value in own.named_parameters():
        if "pos_embed" not in name:
            torch.testing.assert_close(value.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, MAE], ids=["ConvMAE", "MAE"])
def test_learned_positions_get_their_gradient_through_the_interpolation(changes: dict[str, Any]) -> None:
    own, other = both(small(position="learned", **changes))
    images, noise = batch(other.config)
    own(images, noise=noise).loss.backward()
    other(images, noise=noise).loss.backward()
    ahead = own.config.class_tokens

    position = own.encoder.pos_embed.detach()[:, ahead:].clone().requires_grad_()
    assert other.encoder.pos_embed.grad is not None and own.encoder.pos_embed.grad is not None
    bicubic(position, own.config.grid, other.config.grid).backward(other.encoder.pos_embed.grad[:, ahead:])

    torch.testing.assert_close(own.encoder.pos_embed.grad[:, ahead:], position.grad, rtol=1e-4, atol=1e-7)
    of_class = (each.encoder.pos_embed.grad[:, :ahead] for each in (own, other))
    torch.testing.assert_close(*of_class, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_images_of_the_models_own_size_get_the_same_bits_and_the_weights_are_the_same(changes: dict[str, Any]) -> None:
    config = small(**changes)
    plain, several = seeded(config), ConvMAE(config, other_sizes=[OTHER, config.image_shape])
    images, noise = batch(config)

    assert {name: value.shape for name, value in several.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert not list(several.buffers())
    several.load_state_dict(plain.state_dict())
    losses = [model(images, noise=noise).loss for model in (plain, several)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), several.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("grid", "wanted"), [((14, 14), (10, 10)), ((4, 6), (3, 10)), ((2, 2), (5, 1)), ((1, 3), (2, 3))]
)
def test_positions_are_pytorchs_bicubic_ones(grid: tuple[int, int], wanted: tuple[int, int]) -> None:
    position = sincos_position(16, grid, class_tokens=1)

    found = interpolated(position, grid, wanted, class_tokens=1)

    assert torch.equal(found[:, :1], position[:, :1])
    torch.testing.assert_close(found[:, 1:], bicubic(position[:, 1:], grid, wanted), rtol=1e-5, atol=1e-6)
    assert interpolated(position, grid, grid, class_tokens=1) is position
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(interpolated(position, grid, wanted, class_tokens=1), found), "autocast rounds nothing"


def test_a_patch_of_a_smaller_picture_has_about_the_position_of_what_it_shows() -> None:
    """The middle of an image has the same embedding at each size; patch by patch they would be counted anew."""
    large = sincos_position(32, (15, 15))[0].view(15, 15, -1)

    small_ = interpolated(sincos_position(32, (15, 15)), (15, 15), (9, 9))[0].view(9, 9, -1)

    torch.testing.assert_close(small_[4, 4], large[7, 7], rtol=0, atol=1e-6)
    counted = sincos_position(32, (9, 9))[0].view(9, 9, -1)
    assert (small_[8, 8] - large[14, 14]).norm() < 0.3 * (counted[8, 8] - large[14, 14]).norm()


def test_of_another_size_as_many_patches_are_hidden_by_draws_of_the_same_stream() -> None:
    config = ConvMAEConfig(**{**dataclasses.asdict(small()), "image_size": 160, "mask_ratio": 0.75})
    model, ids = ConvMAE(config, other_sizes=[(224, 224)]), torch.tensor([3, 2**40])

    for size in ((160, 160), (224, 224)):
        draws = model.configs[size].mask_patches
        noise = mask_noise(7, 1, ids, draws, "cpu")
        mask = model(torch.zeros(2, 3, *size), noise=noise).mask
        assert mask.shape == (2, draws) and mask.mean().item() == 0.75
        assert torch.equal(noise[:, :100], mask_noise(7, 1, ids, 100, "cpu"))


def test_a_size_that_was_not_named_is_refused_and_so_is_one_that_no_image_can_have() -> None:
    model = ConvMAE(small(), other_sizes=[OTHER])

    with pytest.raises(ModelConfigError, match=r"\(batch, 3, 64, 96\) or \(batch, 3, 48, 160\), got \(1, 3, 48, 96\)"):
        model(torch.zeros(1, 3, 48, 96), noise=torch.zeros(1, 18))
    with pytest.raises(ModelConfigError, match=r"one draw per maskable patch, shape \(1, 30\)"):
        model(torch.zeros(1, 3, *OTHER), noise=torch.zeros(1, 24))
    with pytest.raises(ModelConfigError, match="multiple of 16"):
        ConvMAE(small(), other_sizes=[(40, 48)])


def test_a_pass_with_another_size_needs_no_values() -> None:
    with torch.device("meta"):
        model = ConvMAE(small(position="learned"), other_sizes=[OTHER])
        images, noise = torch.empty(2, 3, *OTHER), torch.empty(2, model.configs[OTHER].mask_patches)

    model(images, noise=noise).loss.backward()

    assert all(value.grad is not None and value.grad.is_meta for value in model.parameters() if value.requires_grad)
