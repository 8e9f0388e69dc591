"""The classifier against the official encoder's own tokens, hand-made heads, and the published layer decay."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from model import Classifier, ConvMAE, ConvMAEConfig, ModelConfigError, WeightsError
from model.layer_decay import layer_scales
from model.noise import DROP_PATH_STREAM, sample_noise

SMALL = ConvMAEConfig(
    image_size=(64, 96), embed_dim=(8, 12, 16), num_heads=2, decoder_dim=16, decoder_num_heads=2, depth=(1, 2, 3)
)
MAE = dataclasses.replace(SMALL, embed_dim=(0, 0, 16), depth=(0, 0, 3), fusion=False)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def made(config: ConvMAEConfig, **options: object) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(config, 5, **options)  # type: ignore[arg-type]
    model.load_pretrained(ConvMAE(config).state_dict())
    return model


def with_head(model: Classifier) -> Classifier:
    """Weights that are not those of a fresh head, so that every one matters."""
    generator = torch.Generator().manual_seed(3)
    for parameter in (*model.fc_norm.parameters(), *model.head.parameters()):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    return model


def test_logits_are_the_head_of_the_official_tokens(
    golden: dict[str, Tensor], official_weights: dict[str, Tensor]
) -> None:
    model = Classifier(ConvMAEConfig(), 7).eval()
    model.load_pretrained(official_weights)
    with_head(model)

    with torch.no_grad():
        found = model(golden["input.imgs"])

    mean = golden["dense.stage3_tokens"].double().mean(1)
    scaled = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    state = {name: value.double() for name, value in model.state_dict().items()}
    features = scaled * state["fc_norm.weight"] + state["fc_norm.bias"]
    expected = features @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_logits_of_mae_are_those_of_a_plain_vit_that_leaves_the_class_token_out_of_its_mean() -> None:
    """Written from He et al. 2022 and models_vit.py with global_pool, in double precision."""
    model = with_head(made(MAE)).double().eval()
    state, heads = model.to_official(), MAE.num_heads

    def normed(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        query, key, value = linear(x, f"{name}.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return linear((weights @ value).transpose(1, 2).flatten(2), f"{name}.proj")

    patches = images().double().unflatten(2, (4, 16)).unflatten(4, (6, 16)).permute(0, 2, 4, 1, 3, 5)
    kernel = state["patch_embed.proj.weight"].flatten(1)
    x = patches.flatten(3).flatten(1, 2) @ kernel.T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(4, -1, -1), x], dim=1) + state["pos_embed"]
    for block in (f"blocks.{place}" for place in range(MAE.depth[2])):
        x = x + attention(normed(x, f"{block}.norm1"), f"{block}.attn")
        hidden = linear(normed(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{block}.mlp.fc2")
    expected = linear(normed(x[:, 1:].mean(1), "fc_norm"), "head")

    torch.testing.assert_close(model(images().double()), expected)


@pytest.mark.parametrize("config", [SMALL, MAE], ids=["ConvMAE", "MAE"])
def test_official_names_are_those_of_the_fine_tuning_class_and_load_again(config: ConvMAEConfig) -> None:
    model = with_head(made(config)).eval()
    official = model.to_official()
    other = Classifier(config, 5).eval()

    other.load_official(official)

    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias", "pos_embed"} <= official.keys()
    assert not any(name.startswith(("encoder.", "decoder", "norm.")) for name in official)
    assert torch.equal(other(images()), model(images()))


def test_a_head_behind_a_batch_norm_becomes_a_plain_one() -> None:
    model = with_head(made(SMALL, kind="linear"))
    for _ in range(3):
        model.train()(images(8) * 3)
    plain = Classifier(SMALL, 5).eval()

    plain.load_official(model.eval().to_official())

    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_only_the_head_of_a_linear_one_is_trained() -> None:
    model = made(SMALL, kind="linear")

    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "head.1.weight",
        "head.1.bias",
    ]
    assert made(SMALL).encoder.pos_embed.requires_grad
    assert not made(dataclasses.replace(SMALL, position="none")).encoder.pos_embed.requires_grad


def test_a_frozen_encoder_drops_no_branches_while_its_head_is_trained() -> None:
    """Else features would follow from PyTorch's generator, and differ between world sizes."""
    model = made(SMALL, kind="linear", drop_path=0.5).train()
    expected = made(SMALL).eval().features(images())

    assert model.noise_draws == 0
    torch.testing.assert_close(model.features(images()), expected)
    assert model.head.training and not model.eval().head.training


@pytest.mark.parametrize("config", [SMALL, MAE], ids=["ConvMAE", "MAE"])
def test_dropped_branches_follow_from_seed_epoch_and_sample_alone(config: ConvMAEConfig) -> None:
    model = with_head(made(config, drop_path=0.5)).train()
    ids = torch.tensor([3, 1, 2, 9])
    noise = sample_noise(5, 1, ids, model.noise_draws, "cpu", stream=DROP_PATH_STREAM)
    assert noise.shape == (4, 2 * (sum(config.depth)))

    together = model(images(), noise)
    alone = torch.cat([model(images()[place : place + 1], noise[place : place + 1]) for place in range(4)])

    torch.testing.assert_close(together, alone)
    other = sample_noise(5, 2, ids, model.noise_draws, "cpu", stream=DROP_PATH_STREAM)
    assert not torch.allclose(together, model(images(), other))
    assert torch.equal(model.eval()(images(), noise), model(images()))


def test_all_branches_but_those_of_the_first_block_are_dropped_or_scaled() -> None:
    """With noise of 0 every block with a rate drops both branches: what is left is the first block and embeddings."""
    model = with_head(made(MAE, drop_path=0.4)).train()
    shallow = with_head(Classifier(dataclasses.replace(MAE, depth=(0, 0, 1)), 5))
    state = {
        name: value for name, value in model.state_dict().items() if ".blocks." not in name or ".blocks.0." in name
    }
    shallow.load_official(state)

    torch.testing.assert_close(model(images(), torch.zeros(4, 6)), shallow.eval()(images()))


def test_positions_are_interpolated_once_when_weights_are_taken() -> None:
    square = dataclasses.replace(SMALL, image_size=(64, 64))
    model = Classifier(SMALL, 5)

    model.load_pretrained(ConvMAE(square).state_dict(), grid=square.grid)

    assert model.encoder.pos_embed.shape == (1, 4 * 6, 16)
    with pytest.raises(WeightsError, match="pos_embed has shape"):
        model.load_pretrained(ConvMAE(square).state_dict())


def test_layer_decay_is_that_of_the_official_fine_tuning() -> None:
    """Three blocks in stage 3: layers 1 to 3, all before is layer 0, all behind layer 4."""
    scales = layer_scales(made(SMALL), 0.65)

    assert scales["fc_norm.weight"] == scales["head.bias"] == 1.0
    assert scales["encoder.blocks3.2.attn.qkv.weight"] == pytest.approx(0.65)
    assert scales["encoder.blocks3.0.norm1.bias"] == pytest.approx(0.65**3)
    for name in ("pos_embed", "patch_embed1.proj.weight", "patch_embed4.bias", "blocks1.0.norm2.bias"):
        assert scales[f"encoder.{name}"] == pytest.approx(0.65**4)
    assert layer_scales(made(MAE), 0.5)["encoder.blocks.1.mlp.fc1.weight"] == 0.25
    assert layer_scales(made(MAE), 0.5)["encoder.cls_token"] == 0.5**4
    assert set(layer_scales(made(SMALL, kind="linear"), 0.65).values()) == {1.0}


def test_names_and_shapes_are_known_without_memory() -> None:
    with torch.device("meta"):
        model = Classifier(SMALL, 5, drop_path=0.1)

    assert model.state_dict().keys() == made(SMALL).state_dict().keys()


def test_what_cannot_be_classified_is_refused() -> None:
    with pytest.raises(ModelConfigError, match="classes: must be at least two, got 1"):
        Classifier(SMALL, 1)
    with pytest.raises(ModelConfigError, match="kind: "):
        Classifier(SMALL, 5, kind="deep")
    with pytest.raises(WeightsError, match=r"head\.weight has shape"):
        Classifier(SMALL, 4).load_official(made(SMALL).to_official())
    with pytest.raises(ModelConfigError, match="images: "):
        made(SMALL)(torch.zeros(1, 3, 60, 64))
