from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import ConvMAE, ConvMAEConfig, ModelConfigError, WeightsError


def test_official_weights_make_the_round_trip_bit_for_bit(official_weights: dict[str, Tensor]) -> None:
    model = ConvMAE(ConvMAEConfig())

    model.load_official(official_weights)
    exported = model.official_state_dict()

    assert exported.keys() == official_weights.keys()
    for name, value in official_weights.items():
        assert torch.equal(exported[name], value), name


def test_fresh_position_embeddings_are_those_of_the_official_code(official_weights: dict[str, Tensor]) -> None:
    fresh = ConvMAE(ConvMAEConfig()).official_state_dict()

    for name in ("pos_embed", "decoder_pos_embed"):
        torch.testing.assert_close(fresh[name], official_weights[name], rtol=0, atol=1e-7)


def test_every_missing_unexpected_and_misshapen_name_is_listed_and_nothing_is_loaded(
    official_weights: dict[str, Tensor],
) -> None:
    model = ConvMAE(ConvMAEConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = dict(official_weights)
    del wrong["mask_token"], wrong["blocks1.0.conv1.bias"]
    wrong["cls_token"] = wrong["head.weight"] = torch.zeros(1)
    wrong["norm.weight"] = torch.zeros(33)
    wrong["patch_embed1.proj.weight"] = torch.zeros(16, 3, 8, 8)

    with pytest.raises(WeightsError) as caught:
        model.load_official(wrong)

    assert isinstance(caught.value, ModelConfigError)
    assert sorted(caught.value.value) == [  # type: ignore[call-overload]
        "missing blocks1.0.conv1.bias",
        "missing mask_token",
        "norm.weight has shape (33,) where the model has (32,)",
        "patch_embed1.proj.weight has shape (16, 3, 8, 8) where the model has (16, 3, 4, 4)",
        "unexpected cls_token",
        "unexpected head.weight",
    ]
    assert "unexpected cls_token" in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_of_very_many_names_the_message_lists_the_first_and_a_count(official_weights: dict[str, Tensor]) -> None:
    official_weights = dict(official_weights)
    surplus = {f"surplus{number}{'x' * 1000}": torch.zeros(1) for number in range(5000)}

    del official_weights["mask_token"]

    with pytest.raises(WeightsError) as caught:
        ConvMAE(ConvMAEConfig()).load_official({**official_weights, **surplus})

    assert "got missing mask_token; unexpected surplus0x" in str(caught.value)
    assert "…; and 4970 more unexpected; use the configuration" in str(caught.value)
    assert "surplus29x" in str(caught.value) and "surplus30x" not in str(caught.value)
    assert len(str(caught.value)) < 10_000
    assert len(caught.value.value) == 5001  # type: ignore[arg-type]


def test_a_whole_training_checkpoint_is_refused_with_what_to_give(official_weights: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r'unexpected model.*give its "model"'):
        ConvMAE(ConvMAEConfig()).load_official({"model": official_weights, "epoch": 1600})  # type: ignore[dict-item]


def test_a_model_without_fusion_refuses_weights_with_it(official_weights: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"unexpected stage1_output_decode\.weight"):
        ConvMAE(ConvMAEConfig(fusion=False)).load_official(official_weights)


def test_sparse_and_dense_models_share_names(official_weights: dict[str, Tensor]) -> None:
    sparse, dense = ConvMAE(ConvMAEConfig()), ConvMAE(ConvMAEConfig(), dense=True)

    dense.load_state_dict(sparse.state_dict())

    assert dense.state_dict().keys() == sparse.state_dict().keys()
