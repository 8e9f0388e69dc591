"""Complementary masking: several views of an image, of which each patch is visible in exactly one."""

from __future__ import annotations

import pytest
import torch
from small_models import batch, seeded, small
from torch import Tensor

from model import ConvMAE, ConvMAEConfig, mask_noise
from model.masking import draw_mask

VARIANTS = [
    {"views": 4},
    {"views": 2, "mask_ratio": 0.5, "loss": "l1", "norm_pix": False, "position": "learned"},
    {"views": 3, "mask_ratio": 0.667, "kernel_size": 7, "depth": (2, 2, 1)},
    {"views": 24, "mask_ratio": 23 / 24, "fusion": False, "decoder_depth": 1},
    {"views": 4, "masking": "random", "loss": "l1"},
    {"views": 4, "in_channels": 1},
    {"views": 6, "mask_ratio": 5 / 6, "masking": "random", "norm_pix": False},
    {"views": 4, "embed_dim": (0, 0, 16), "depth": (0, 0, 2), "fusion": False},
]


def gradients(model: ConvMAE) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


def rotated(noise: Tensor, ranks: int) -> Tensor:
    """Noise by which the first patches are those that have `ranks` before them."""
    order = noise.argsort(dim=1).argsort(dim=1)
    return ((order - ranks) % noise.shape[1]).float()


def official(golden_views: dict[str, Tensor], dense: bool = False, **changes: object) -> ConvMAE:
    model = ConvMAE(ConvMAEConfig(**{"views": 4, "decoder_depth": 8, **changes}), dense=dense)  # type: ignore[arg-type]
    model.load_official({k.removeprefix("weight."): v for k, v in golden_views.items() if k.startswith("weight.")})
    return model


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("loss", "norm_pix"), [("mse", True), ("l1", False)])
def test_loss_and_masks_are_those_of_the_official_code(
    golden_views: dict[str, Tensor], loss: str, norm_pix: bool, dense: bool
) -> None:
    model = official(golden_views, dense, loss=loss, norm_pix=norm_pix)

    with torch.no_grad():
        out = model(golden_views["input.imgs"], noise=golden_views["input.noise"])

    expected = golden_views[f"out.loss_{loss}_{'norm' if norm_pix else 'raw'}pix"].item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    views_first = golden_views["out.mask"].view(4, 2, 196)
    assert torch.equal(out.mask.view(2, 4, 196), views_first.transpose(0, 1))


@pytest.mark.parametrize("dense", [False, True])
def test_every_gradient_is_that_of_the_official_code(golden_views: dict[str, Tensor], dense: bool) -> None:
    model = official(golden_views, dense)

    model(golden_views["input.imgs"], noise=golden_views["input.noise"]).loss.backward()

    found = {name.split(".", 1)[1]: value for name, value in gradients(model).items()}
    expected = {name.removeprefix("grad."): value for name, value in golden_views.items() if name.startswith("grad.")}
    assert largest_error(found, expected) < 1e-5


@pytest.mark.parametrize("view", range(4))
def test_reconstruction_of_rotated_noise_is_the_official_prediction_of_that_view(
    golden_views: dict[str, Tensor], view: int
) -> None:
    model, noise = official(golden_views), golden_views["input.noise"]

    with torch.no_grad():
        prediction = model.reconstruct(golden_views["input.imgs"], noise=rotated(noise, 49 * view))

    expected = golden_views["out.pred_every_7th_patch"].view(4, 2, 28, 768)[view]
    torch.testing.assert_close(prediction[:, ::7], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masking", ["block", "random"])
@pytest.mark.parametrize("views", [2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("image_size", [(64, 96), (96, 192), (192, 128), (384, 16)])
def test_each_patch_is_visible_in_exactly_one_view(image_size: tuple[int, int], views: int, masking: str) -> None:
    config = small(image_size=image_size, views=views, mask_ratio=1 - 1 / views, masking=masking)
    noise = mask_noise(7, 3, torch.arange(5), config.mask_patches, "cpu")

    mask = draw_mask(noise, config.kept, views)

    assert torch.equal((1 - mask.mask).view(5, views, -1).sum(1), torch.ones(5, config.mask_patches))
    assert mask.kept.view(5, -1).sort(dim=1).values.tolist() == [list(range(config.mask_patches))] * 5
    assert torch.equal(torch.cat([mask.kept, mask.hidden], dim=1).sort(dim=1).values[0], torch.arange(noise.shape[1]))
    assert torch.equal(mask.kept, mask.kept.sort(dim=1).values)
    assert torch.equal(mask.hidden, mask.hidden.sort(dim=1).values)


def test_views_keep_the_ranks_of_the_noise_in_turn() -> None:
    noise = torch.rand(4, 24, generator=torch.Generator().manual_seed(0))
    ranks = noise.argsort(dim=1).argsort(dim=1)

    mask = draw_mask(noise, 6, views=4)

    for image in range(4):
        for view in range(4):
            kept = mask.kept[4 * image + view]
            assert ranks[image, kept].sort().values.tolist() == list(range(6 * view, 6 * view + 6))
    assert torch.equal(mask.kept[::4], draw_mask(noise, 6).kept), "the first view is the only one of one view"


def test_equal_noise_is_decided_by_position_in_every_view() -> None:
    mask = draw_mask(torch.full((1, 6), 0.5), 2, views=3)

    assert mask.kept.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_and_gradients_are_the_mean_over_separate_passes(changes: dict[str, object], dense: bool) -> None:
    config = small(**changes)
    images, noise = batch(config)
    as_many = 1 - (config.kept + 0.5) / config.mask_patches  # 1 - 2/3 is rounded to less than a third
    together, separate = seeded(config, dense), seeded(small(**{**changes, "views": 1, "mask_ratio": as_many}))

    out = together(images, noise=noise)
    out.loss.backward()
    losses, masks = [], []
    for view in range(config.views):
        one = separate(images, noise=rotated(noise, view * config.kept))
        (one.loss / config.views).backward()
        losses.append(one.loss.item())
        masks.append(one.mask)

    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert torch.equal(out.mask, torch.cat(masks, dim=1))
    assert largest_error(gradients(together), gradients(separate)) < 2e-5


@pytest.mark.parametrize("part", ["stage1", "stage2", "stage3", "decoder"])
def test_recomputing_a_part_changes_no_value(part: str) -> None:
    config = small(views=4)
    images, noise = batch(config)
    plain, recomputing = seeded(config), ConvMAE(config, recompute=[part])
    recomputing.load_state_dict(plain.state_dict())

    losses = [model(images, noise=noise).loss for model in (plain, recomputing)]
    for loss in losses:
        loss.backward()

    assert losses[0].item() == losses[1].item()
    expected = gradients(plain)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(recomputing).items())


@pytest.mark.parametrize("masking", ["block", "random"])
def test_what_is_hidden_in_a_view_does_not_influence_what_it_encodes(masking: str) -> None:
    config = small(masking=masking, views=4, kernel_size=9)
    images, noise = batch(config, size=2)
    model, mask = seeded(config), draw_mask(noise, config.kept, 4)
    side = config.image_shape[0] // config.noise_shape[0]
    hidden = mask.mask.view(2, 4, 1, *config.noise_shape).repeat_interleave(side, 3).repeat_interleave(side, 4) == 1

    with torch.no_grad():
        encoded = model.encoder(images, mask.kept).unflatten(0, (2, 4))
        for view in range(4):
            without = model.encoder(images.masked_fill(hidden[:, view], 1e3), mask.kept).unflatten(0, (2, 4))
            torch.testing.assert_close(without[:, view], encoded[:, view], rtol=0, atol=0)
            assert not torch.equal(without, encoded)


@pytest.mark.parametrize("masking", ["block", "random"])
def test_every_image_counts_the_same_and_has_a_row_of_masks(masking: str) -> None:
    config = small(masking=masking, views=4)
    images, noise = batch(config, size=4)
    model = seeded(config)

    with torch.no_grad():
        together = model(images, noise=noise)
        alone = [model(images[i : i + 1], noise=noise[i : i + 1]) for i in range(4)]

    assert together.loss.item() == pytest.approx(torch.stack([one.loss for one in alone]).mean().item(), rel=1e-6)
    assert torch.equal(together.mask, torch.cat([one.mask for one in alone]))
    assert together.mask.shape == (4, 4 * config.mask_patches)


@pytest.mark.parametrize("masking", ["block", "random"])
def test_a_step_never_waits_for_a_value_from_the_device(masking: str) -> None:
    # Tensors on the meta device have no values: any host synchronisation raises.
    config = small(masking=masking, views=4)
    with torch.device("meta"):
        model = ConvMAE(config)
        images, noise = torch.empty(2, 3, *config.image_shape), torch.empty(2, config.mask_patches)

    out = model(images, noise=noise)
    out.loss.backward()

    assert out.loss.shape == ()
    assert all(gradient.is_meta for gradient in gradients(model).values())
