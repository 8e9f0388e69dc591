from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from model import Backbone, ConvMAE, ConvMAEConfig, ModelConfigError, WeightsError

SMALL = ConvMAEConfig(
    image_size=(64, 96), embed_dim=(8, 12, 16), num_heads=2, decoder_dim=16, decoder_num_heads=2, depth=(1, 2, 2)
)


def pretrained(config: ConvMAEConfig = SMALL) -> ConvMAE:
    torch.manual_seed(0)
    return ConvMAE(config)


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("official", [False, True])
def test_a_loaded_backbone_gives_the_maps_of_the_pretrained_encoder(official: bool) -> None:
    model = pretrained()
    backbone = Backbone(SMALL)

    backbone.load(model.official_state_dict() if official else model.state_dict())

    with torch.no_grad():
        for found, expected in zip(backbone(images(64, 96)), model.encode_dense(images(64, 96)), strict=True):
            assert torch.equal(found, expected)


def test_official_weights_give_the_official_maps(
    golden: dict[str, Tensor], official_weights: dict[str, Tensor]
) -> None:
    backbone = Backbone(ConvMAEConfig())
    backbone.load(official_weights)

    with torch.no_grad():
        stage1, _, stage3 = backbone(golden["input.imgs"])

    torch.testing.assert_close(stage1[:, :, ::4, ::4], golden["dense.stage1_every_4th_place"])
    torch.testing.assert_close(stage3.flatten(2).mT, golden["dense.stage3_tokens"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (128, 192), (16, 16), (80, 48), (70, 97)])
def test_maps_have_strides_4_8_16_and_32_for_any_image_size(height: int, width: int) -> None:
    rows, columns = -(-height // 16), -(-width // 16)

    maps = Backbone(SMALL)(images(height, width))

    assert maps.stage1.shape == (2, 8, 4 * rows, 4 * columns)
    assert maps.stage2.shape == (2, 12, 2 * rows, 2 * columns)
    assert maps.stage3.shape == (2, 16, rows, columns)
    assert maps.pooled.shape == (2, 16, -(-rows // 2), -(-columns // 2))
    assert all(torch.isfinite(found).all() for found in maps)


def test_sizes_that_are_no_multiple_of_16_are_padded_with_zeros() -> None:
    backbone = Backbone(SMALL)
    whole = images(80, 112)
    whole[:, :, 70:], whole[:, :, :, 97:] = 0, 0

    for found, expected in zip(backbone(whole[:, :, :70, :97]), backbone(whole), strict=True):
        assert torch.equal(found, expected)


def test_a_position_embedding_of_twice_the_size_keeps_its_course() -> None:
    """A learned embedding that grows linearly still does, away from borders, when there are twice as many patches."""
    backbone = Backbone(dataclasses.replace(SMALL, position="learned"))
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    with torch.no_grad():
        backbone.encoder.pos_embed.copy_((rows + 10 * columns).view(1, 24, 1).expand(-1, -1, 16))
        inputs = []
        backbone.encoder.blocks3[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        backbone.encoder.patch_embed4.weight.zero_()
        backbone.encoder.patch_embed4.bias.zero_()

        backbone(images(128, 192))

    position = inputs[0][0, :, 0].view(8, 12)
    fine_rows, fine_columns = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    expected = (fine_rows - 0.5) / 2 + 10 * (fine_columns - 0.5) / 2
    torch.testing.assert_close(position[3:-3, 3:-3], expected[3:-3, 3:-3], rtol=0, atol=1)  # columns step by 5


def test_every_parameter_gets_a_gradient() -> None:
    backbone = Backbone(SMALL)

    sum(found.square().mean() for found in backbone(images(64, 96))).backward()

    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_stochastic_depth_grows_to_the_last_block_and_acts_in_training_only() -> None:
    torch.manual_seed(0)
    backbone, plain = Backbone(SMALL, drop_path=0.5), Backbone(SMALL)
    plain.load_state_dict(backbone.state_dict())
    encoder = backbone.encoder
    rates = [block.drop_path for stage in (encoder.blocks1, encoder.blocks2, encoder.blocks3) for block in stage]
    with torch.no_grad():
        assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
        assert torch.equal(backbone.eval()(images(64, 96)).stage3, plain.eval()(images(64, 96)).stage3)
        assert not torch.equal(backbone.train()(images(64, 96)).stage3, plain.train()(images(64, 96)).stage3)


def test_a_dropped_branch_is_zero_for_some_images_and_scaled_for_the_others() -> None:
    torch.manual_seed(0)
    backbone = Backbone(SMALL, drop_path=0.5).train()
    last = backbone.encoder.blocks3[-1]
    with torch.no_grad():
        last.mlp.fc2.weight.zero_()
        last.mlp.fc2.bias.zero_()
        x = torch.randn(400, 4, 16)
        change = last(x) - x
        branch = last.attn(last.qkv(x))

    dropped = change.flatten(1).abs().amax(1) < 1e-6
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(change[~dropped], 2 * branch[~dropped], rtol=1e-4, atol=1e-5)


def test_the_head_of_a_fine_tuned_classifier_is_ignored() -> None:
    state = pretrained().official_state_dict() | {"head.weight": torch.zeros(9, 16), "fc_norm.bias": torch.zeros(16)}
    backbone = Backbone(SMALL)

    backbone.load(state)

    assert torch.equal(backbone.encoder.patch_embed1.proj.weight, state["patch_embed1.proj.weight"])


def test_weights_of_another_architecture_are_refused_with_every_name() -> None:
    state = pretrained(dataclasses.replace(SMALL, depth=(1, 1, 3), kernel_size=7)).official_state_dict()

    with pytest.raises(WeightsError) as refused:
        Backbone(SMALL).load(state)

    faults = refused.value.value
    assert any(fault.startswith("missing blocks2.1.") for fault in faults)
    assert any(fault.startswith("unexpected blocks3.2.") for fault in faults)
    assert any(fault.startswith("blocks1.0.attn.weight has shape (8, 1, 7, 7)") for fault in faults)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Backbone(SMALL, drop_path=1.0), r"drop_path: must be in \[0, 1\), got 1.0"),
        (lambda: Backbone(SMALL)(torch.zeros(3, 64, 96)), r"images: must have shape \(batch, 3, height, width\)"),
        (lambda: Backbone(SMALL)(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)), r"images: must be normalised floats"),
    ],
)
def test_what_cannot_be_is_refused(call: object, message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        call()  # type: ignore[operator]
