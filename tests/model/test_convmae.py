from __future__ import annotations

import pytest
import torch
from small_models import batch, seeded, small
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model import ConvMAE, ConvMAEConfig, ModelConfigError
from model.config import LOSSES, PARTS
from model.masking import draw_mask

VARIANTS = [
    {},
    {"image_size": 64, "mask_ratio": 0.5},
    {"mask_ratio": 0.9, "depth": (2, 2, 1), "mlp_ratio": (2, 3, 4)},
    {"mask_ratio": 0.1, "kernel_size": 7, "loss": "l1"},
    {"kernel_size": 9, "norm_pix": False},
    {"kernel_size": 1, "image_size": (16, 128)},
    {"fusion": False},
    {"position": "none"},
    {"position": "learned", "loss": "l1", "norm_pix": False},
    {"masking": "random"},
    {"masking": "random", "mask_ratio": 0.6, "loss": "l1", "fusion": False, "position": "learned"},
    {"masking": "random", "norm_pix": False, "kernel_size": 7, "depth": (2, 1, 1)},
    {"in_channels": 1},
    {"in_channels": 5, "masking": "random", "loss": "l1"},
    {"in_channels": 1, "embed_dim": (0, 0, 16), "depth": (0, 0, 2), "fusion": False},
    {"decoder_depth": 1},
    {"decoder_depth": 3, "mask_ratio": 0.04},
    {"embed_dim": (0, 0, 16), "depth": (0, 0, 2), "fusion": False},
    {"embed_dim": (0, 0, 16), "depth": (0, 0, 1), "fusion": False, "decoder_depth": 1, "position": "learned"},
]


def gradients(model: ConvMAE) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def kept_for_backward(model: ConvMAE, images: Tensor, noise: Tensor) -> tuple[Tensor, int]:
    """The loss, and the bytes of activations that its graph holds."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, noise=noise).loss
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return loss, sum(storages.values())


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_mask_are_those_of_the_official_code(
    golden: dict[str, Tensor], official_weights: dict[str, Tensor], loss: str, norm_pix: bool, dense: bool
) -> None:
    model = ConvMAE(ConvMAEConfig(loss=loss, norm_pix=norm_pix), dense=dense)
    model.load_official(official_weights)

    with torch.no_grad():
        out = model(golden["input.imgs"], noise=golden["input.noise"])

    expected = golden[f"out.loss_{loss}_{'norm' if norm_pix else 'raw'}pix"].item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(out.mask, golden["out.mask"])


@pytest.mark.parametrize("dense", [False, True])
def test_every_gradient_is_that_of_the_official_code(
    golden: dict[str, Tensor], official_weights: dict[str, Tensor], dense: bool
) -> None:
    model = ConvMAE(ConvMAEConfig(), dense=dense)
    model.load_official(official_weights)

    model(golden["input.imgs"], noise=golden["input.noise"]).loss.backward()

    found = {name.split(".", 1)[1]: gradient for name, gradient in gradients(model).items()}
    expected = {name.removeprefix("grad."): value for name, value in golden.items() if name.startswith("grad.")}
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("dense", [False, True])
def test_reconstruction_is_the_official_prediction(
    golden: dict[str, Tensor], official_weights: dict[str, Tensor], dense: bool
) -> None:
    model = ConvMAE(ConvMAEConfig(), dense=dense)
    model.load_official(official_weights)

    with torch.no_grad():
        prediction = model.reconstruct(golden["input.imgs"], noise=golden["input.noise"])

    assert prediction.shape == (2, 196, 768)
    torch.testing.assert_close(prediction[:, ::7], golden["out.pred_every_7th_patch"], rtol=1e-5, atol=1e-5)


def test_dense_features_are_those_of_the_official_encoder(
    golden: dict[str, Tensor], official_weights: dict[str, Tensor]
) -> None:
    model = ConvMAE(ConvMAEConfig())
    model.load_official(official_weights)

    with torch.no_grad():
        stage1, stage2, stage3 = model.encode_dense(golden["input.imgs"])
        tokens = stage3.flatten(2).transpose(1, 2)
        normed = model.encoder.norm(tokens)

    torch.testing.assert_close(stage1[:, :, ::4, ::4], golden["dense.stage1_every_4th_place"])
    torch.testing.assert_close(stage2[:, :, ::2, ::2], golden["dense.stage2_every_2nd_place"])
    torch.testing.assert_close(tokens, golden["dense.stage3_tokens"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normed, golden["dense.stage3_norm"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_sparse_equals_dense_in_loss_mask_and_every_gradient(changes: dict[str, object]) -> None:
    config = small(**changes)
    images, noise = batch(config)
    sparse, dense = seeded(config), seeded(config, dense=True)

    out, reference = sparse(images, noise=noise), dense(images, noise=noise)
    out.loss.backward()
    reference.loss.backward()

    assert out.loss.item() == pytest.approx(reference.loss.item(), rel=1e-6)
    assert torch.equal(out.mask, reference.mask)
    assert out.mask.sum(1).tolist() == [config.mask_patches - config.kept] * 3
    expected = gradients(dense)
    errors = {name: relative_error(value, expected[name]) for name, value in gradients(sparse).items()}
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("masking", ["block", "random"])
def test_recomputing_a_part_changes_no_value_and_keeps_fewer_bytes(part: str, masking: str) -> None:
    config = small(masking=masking, depth=(2, 2, 2), decoder_depth=2)
    images, noise = batch(config)
    plain, recomputing = seeded(config), ConvMAE(config, recompute=[part])
    recomputing.load_state_dict(plain.state_dict())

    (loss, many), (same_loss, few) = (kept_for_backward(model, images, noise) for model in (plain, recomputing))
    loss.backward()
    same_loss.backward()

    assert loss.item() == same_loss.item()
    expected = gradients(plain)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(recomputing).items())
    assert few < 0.95 * many


def test_a_part_that_no_model_has_is_refused() -> None:
    with pytest.raises(ModelConfigError, match=r"recompute: .*got 'stage4'; did you mean 'stage3'\?"):
        ConvMAE(small(), recompute=["stage4"])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("masking", ["block", "random"])
def test_with_nothing_hidden_all_is_predicted_and_the_loss_is_the_mean_over_nothing(masking: str, dense: bool) -> None:
    config = small(mask_ratio=0.0, masking=masking)
    images, noise = batch(config)
    model = seeded(config, dense)

    with torch.no_grad():
        out = model(images, noise=noise)
        prediction = model.reconstruct(images, noise=noise)
        other = model.reconstruct(images, noise=1 - noise)

    assert out.loss.isnan()
    assert not out.mask.any()
    assert torch.equal(prediction, other)
    assert prediction.shape == (3, 24, 768)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_is_the_error_of_masked_pixels_of_the_reconstruction(changes: dict[str, object]) -> None:
    config = small(**{**changes, "norm_pix": False})
    images, noise = batch(config)
    model = seeded(config)

    with torch.no_grad():
        out = model(images, noise=noise)
        prediction = model.reconstruct(images, noise=noise)

    rows, columns = config.grid
    pixels = torch.einsum("nhwpqc->nchpwq", prediction.reshape(3, rows, columns, 16, 16, config.in_channels)).reshape(
        images.shape
    )
    side = config.image_shape[0] // config.noise_shape[0]
    hidden = out.mask.reshape(3, 1, *config.noise_shape).repeat_interleave(side, 2).repeat_interleave(side, 3)
    difference = (pixels - images)[hidden.expand_as(images) == 1]
    expected = difference.abs().mean() if config.loss == "l1" else difference.square().mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("masking", ["block", "random"])
def test_masked_pixels_do_not_influence_what_is_encoded(masking: str) -> None:
    config = small(masking=masking, depth=(2, 2, 1), kernel_size=9)
    images, noise = batch(config)
    model = seeded(config)
    mask = draw_mask(noise, config.kept)
    side = config.image_shape[0] // config.noise_shape[0]
    hidden = mask.mask.reshape(3, 1, *config.noise_shape).repeat_interleave(side, 2).repeat_interleave(side, 3) == 1

    with torch.no_grad():
        encoded = model.encoder(images, mask.kept)
        without = model.encoder(images.masked_fill(hidden, 1e3), mask.kept)
        other = model.encoder(images.masked_fill(~hidden, 1.0), mask.kept)

    assert torch.equal(encoded, without)
    assert not torch.equal(encoded, other)


@pytest.mark.parametrize("masking", ["block", "random"])
def test_every_image_counts_the_same_in_the_loss(masking: str) -> None:
    config = small(masking=masking, mask_ratio=0.7)
    images, noise = batch(config, size=4)
    model = seeded(config)

    with torch.no_grad():
        together = model(images, noise=noise).loss
        alone = [model(images[i : i + 1], noise=noise[i : i + 1]).loss for i in range(4)]

    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-6)


@pytest.mark.parametrize("masking", ["block", "random"])
def test_a_step_never_waits_for_a_value_from_the_device(masking: str) -> None:
    # Tensors on the meta device have no values: any host synchronisation raises.
    config = small(masking=masking)
    with torch.device("meta"):
        model = ConvMAE(config)
        images, noise = torch.empty(2, 3, *config.image_shape), torch.empty(2, config.mask_patches)

    out = model(images, noise=noise)
    out.loss.backward()

    assert out.loss.shape == ()
    assert all(gradient.is_meta for gradient in gradients(model).values())


@pytest.mark.parametrize("changes", [{}, {"masking": "random"}], ids=str)
def test_bf16_parameters_and_bf16_autocast_stay_close_to_fp32(changes: dict[str, object]) -> None:
    config = small(**changes)
    images, noise = batch(config)
    model = seeded(config)

    with torch.no_grad():
        exact = model(images, noise=noise).loss
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images, noise=noise).loss
        half = model.to(torch.bfloat16)(images, noise=noise).loss

    assert mixed.dtype == half.dtype == torch.float32
    assert mixed.item() == pytest.approx(exact.item(), rel=0.02)
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    assert half.item() != exact.item()


def test_training_on_one_batch_lowers_the_loss() -> None:
    config = small()
    images, noise = batch(config)
    torch.manual_seed(0)
    model = ConvMAE(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)

    losses = []
    for _ in range(20):
        loss = model(images, noise=noise).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

    assert losses[-1] < 0.9 * losses[0]


def test_position_none_and_sincos_are_frozen_and_learned_is_not() -> None:
    trained = {kind: ConvMAE(small(position=kind)).encoder.pos_embed for kind in ("none", "sincos", "learned")}

    assert [p.requires_grad for p in trained.values()] == [False, False, True]
    assert not trained["none"].any()


def test_images_of_another_size_are_refused() -> None:
    config = small()
    images, noise = batch(config)

    with pytest.raises(ModelConfigError, match=r"images: must have shape \(batch, 3, 64, 96\), got \(3, 3, 64, 64\)"):
        ConvMAE(config)(images[..., :64], noise=noise)


def test_images_that_were_not_normalised_are_refused() -> None:
    config = small()
    images, noise = batch(config)

    with pytest.raises(ModelConfigError, match=r"images: must be normalised floats, got torch\.uint8; .*normalise"):
        ConvMAE(config)(images.to(torch.uint8), noise=noise)


def test_noise_of_another_shape_is_refused() -> None:
    config = small(masking="random")
    images, noise = batch(config)

    with pytest.raises(ModelConfigError, match=r"noise: .*\(3, 384\), got \(3, 24\)"):
        ConvMAE(config)(images, noise=noise[:, :24])
