from __future__ import annotations

import dataclasses
import json

import pytest

from model import ConvMAE, ConvMAEConfig, ModelConfigError
from model.config import PRESETS


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"image_size": 100}, "image_size"),
        ({"image_size": (224, 200)}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": "224"}, "image_size"),
        ({"image_size": (224, 224, 3)}, "image_size"),
        ({"embed_dim": (16, 24)}, "embed_dim"),
        ({"embed_dim": (16, 24, 32.0)}, "embed_dim"),
        ({"embed_dim": (16, 24, 34), "num_heads": 2}, "embed_dim"),
        ({"depth": (1, 0, 2)}, "depth"),
        ({"depth": (1, 1, 0)}, "depth"),
        ({"depth": (0, 0, 2), "fusion": False}, "depth"),
        ({"embed_dim": (0, 0, 32), "fusion": False}, "embed_dim"),
        ({"embed_dim": (0, False, 32), "depth": (0, 0, 2), "fusion": False}, "embed_dim"),
        ({"embed_dim": (0, 0, 32), "depth": (0, 0, 2)}, "fusion"),
        ({"embed_dim": (0, 0, 32), "depth": (0, 0, 2), "fusion": False, "masking": "random"}, "masking"),
        ({"image_size": (224, 16400)}, "image_size"),
        ({"embed_dim": (16, 24, 4 * 10**12)}, "embed_dim"),
        ({"embed_dim": (65540, 24, 32)}, "embed_dim"),
        ({"depth": (1, 1001, 2)}, "depth"),
        ({"decoder_dim": 65540}, "decoder_dim"),
        ({"decoder_depth": 10**8}, "decoder_depth"),
        ({"num_heads": 2048, "embed_dim": (16, 24, 8192)}, "num_heads"),
        ({"decoder_num_heads": 2048, "decoder_dim": 8192}, "decoder_num_heads"),
        ({"mlp_ratio": (4, 257, 4)}, "mlp_ratio"),
        ({"kernel_size": 257}, "kernel_size"),
        ({"in_channels": 0}, "in_channels"),
        ({"in_channels": 65}, "in_channels"),
        ({"in_channels": 3.0}, "in_channels"),
        ({"num_heads": 5}, "num_heads"),
        ({"num_heads": True}, "num_heads"),
        ({"mlp_ratio": 4}, "mlp_ratio"),
        ({"decoder_dim": 30, "decoder_num_heads": 2}, "decoder_dim"),
        ({"decoder_depth": 0}, "decoder_depth"),
        ({"decoder_num_heads": 7}, "decoder_num_heads"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": -0.1}, "mask_ratio"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"mask_ratio": "0.75"}, "mask_ratio"),
        ({"mask_ratio": 0.75, "image_size": 16}, "mask_ratio"),
        ({"views": 0}, "views"),
        ({"views": 4.0}, "views"),
        ({"views": True}, "views"),
        ({"views": 2}, "views"),
        ({"views": 4, "mask_ratio": 0.74}, "views"),
        ({"views": 4, "mask_ratio": 0}, "views"),
        ({"views": 10**400}, "views"),
        ({"views": 10**9, "mask_ratio": 0.9999}, "views"),
        ({"views": 4, "image_size": 112}, "views"),
        ({"views": 3, "mask_ratio": 0.667, "masking": "random", "image_size": 64}, "views"),
        ({"masking": "blok"}, "masking"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"kernel_size": 5.0}, "kernel_size"),
        ({"fusion": 1}, "fusion"),
        ({"position": "sin-cos"}, "position"),
        ({"loss": "l2"}, "loss"),
        ({"norm_pix": None}, "norm_pix"),
    ],
    ids=str,
)
def test_an_impossible_value_names_its_field_value_and_remedy(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        ConvMAEConfig(**changes)  # type: ignore[arg-type]

    error = caught.value
    assert isinstance(error, ValueError)
    assert error.field == field
    assert error.rule
    assert error.remedy
    assert str(error) == f"{field}: {error.rule}, got {error.value!r}; {error.remedy}"


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"masking": "blok"}, "did you mean 'block'?"),
        ({"position": "learnt"}, "did you mean 'learned'?"),
        ({"loss": "huber"}, "choose one of l1, mse"),
        ({"image_size": (230, 224)}, "use 224 in place of 230"),
        ({"num_heads": 5}, "use 4 heads or another embed_dim"),
        ({"decoder_depth": 10**8}, "use 1000 or less"),
        ({"kernel_size": 6}, "use 7"),
        ({"views": 2}, "set mask_ratio=0.5 or views=4"),
        ({"views": 3, "mask_ratio": 0.6}, "set mask_ratio=0.6667 or views=1"),
        ({"views": 4, "image_size": 112}, "use views=1, or another image_size"),
        (
            {"views": 6, "mask_ratio": 0.8333, "image_size": 160},
            "use views=5 with mask_ratio=0.8, or another image_size",
        ),
    ],
    ids=str,
)
def test_the_remedy_is_a_value_that_works(changes: dict[str, object], remedy: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        ConvMAEConfig(**changes)  # type: ignore[arg-type]

    assert caught.value.remedy == remedy


def test_the_remedies_for_views_are_configurations() -> None:
    assert ConvMAEConfig(views=2, mask_ratio=0.5).kept == 98
    assert ConvMAEConfig(views=5, mask_ratio=0.8, image_size=160).kept == 20


@pytest.mark.parametrize("views", [2, 3, 4, 6, 7, 12, 14, 21, 28, 42, 49, 84, 98, 147, 196, 294, 588])
def test_views_share_all_patches_whatever_their_ratio_rounds_to(views: int) -> None:
    config = ConvMAEConfig(image_size=(336, 448), views=views, mask_ratio=round(1 - 1 / views, 4))

    assert config.kept * views == config.patches
    assert config == ConvMAEConfig(image_size=(336, 448), views=views, mask_ratio=1 - 1 / views)


def test_an_unknown_preset_or_field_suggests_the_nearest() -> None:
    with pytest.raises(ModelConfigError, match=r"preset: must be one of .*, got 'bas'; did you mean 'base'\?"):
        ConvMAEConfig.preset("bas")
    with pytest.raises(ModelConfigError, match=r"got 'mask_ration'; did you mean 'mask_ratio'\?"):
        ConvMAEConfig.preset("base", mask_ration=0.5)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_changed_in_any_field(name: str) -> None:
    preset = ConvMAEConfig.preset(name)

    changed = ConvMAEConfig.preset(name, loss="l1", image_size=(64, 96))

    assert changed == dataclasses.replace(preset, loss="l1", image_size=(64, 96))
    assert changed != preset


def test_a_configuration_survives_json_and_is_hashable() -> None:
    config = ConvMAEConfig.preset("tiny", masking="random", image_size=160)

    copy = ConvMAEConfig(**json.loads(json.dumps(dataclasses.asdict(config))))

    assert copy == config
    assert hash(copy) == hash(config)


def test_a_number_and_a_pair_mean_the_same_image_size() -> None:
    assert ConvMAEConfig(image_size=64) == ConvMAEConfig(image_size=(64, 64))


@pytest.mark.parametrize("masking", ["block", "random"])
def test_the_grid_follows_the_image_size(masking: str) -> None:
    config = ConvMAEConfig(image_size=(64, 96), masking=masking)

    assert config.grid == (4, 6)
    assert config.patches == 24
    assert config.noise_shape == ((4, 6) if masking == "block" else (16, 24))
    assert config.mask_patches == config.noise_shape[0] * config.noise_shape[1]
    assert config.kept == config.mask_patches // 4


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConvMAEConfig().loss = "l1"  # type: ignore[misc]


def test_a_model_far_beyond_the_published_ones_can_be_described() -> None:
    config = ConvMAEConfig.preset("huge", image_size=16384, embed_dim=(8192, 16384, 65536), depth=(8, 8, 1000))

    assert config.patches == 1024 * 1024


def test_the_demonstration_preset_builds() -> None:
    assert ConvMAE(ConvMAEConfig.preset("tiny")).config.image_shape == (128, 128)
