from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.checkpoint.rank_group import RankGroup
from jobs.errors import RecipeError, WeightsFileError
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.weights.initial import load_pretrained_encoder, pinned
from jobs.weights.named_weights import check_is_finetuning, resolved_weights
from jobs.weights.weight_files import model_json, write_tensors
from model import Classifier, ConvMAE, ConvMAEConfig
from model.position import interpolated
from pipeline.host.local_files import sha256_of
from pipeline.store.storage import Storage

CONFIG = ConvMAEConfig.preset("tiny", image_size=64, depth=(1, 1, 1), position="learned")
STORAGE = Storage()


def recipe(url: str, **changes: object) -> Recipe:
    given = {"model.depth": [1, 1, 1], "model.image_size": 64, "model.position": "learned", "init_from": url}
    return named_recipe("tiny_finetune").amended({**given, "finetune.classes": ["a", "b"], **changes})


@pytest.fixture
def pretrained() -> ConvMAE:
    torch.manual_seed(0)
    return ConvMAE(CONFIG)


def weights(folder: Path, model: ConvMAE, *, official: bool) -> str:
    """A file of the model's weights."""
    path = folder / ("official.pth" if official else "own.safetensors")
    if official:
        torch.save({"model": model.official_state_dict()}, path)
    else:
        write_tensors(model.state_dict(), path, {"format": "pt", "model": model_json(CONFIG)})
    return str(path)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("side", [64, 96])
def test_a_classifier_has_the_encoder_of_the_pretraining_and_positions_of_its_own_size(
    tmp_path: Path, pretrained: ConvMAE, official: bool, side: int
) -> None:
    url = weights(tmp_path, pretrained, official=official)
    run = RunDirectory(STORAGE, str(tmp_path / "run"))
    given = pinned(STORAGE, recipe(url, **{"model.image_size": side}), run)

    model = Classifier(given.model, 2)
    model.load_pretrained(*load_pretrained_encoder(STORAGE, given, RankGroup()))

    expected = interpolated(pretrained.encoder.pos_embed, (4, 4), (side // 16, side // 16))
    assert given.init_sha256 == sha256_of(Path(url))
    assert torch.equal(model.encoder.pos_embed, expected)
    assert torch.equal(model.state_dict()["encoder.patch_embed4.weight"], pretrained.encoder.patch_embed4.weight)


def test_weights_of_another_architecture_are_refused_with_what_fits_them(tmp_path: Path, pretrained: ConvMAE) -> None:
    url, run = weights(tmp_path, pretrained, official=False), RunDirectory(STORAGE, str(tmp_path / "run"))
    changes = {"model.depth": [1, 1, 2], "model.num_heads": 4}

    with pytest.raises(
        WeightsFileError, match=r"depth is \(1, 1, 1\) there.*set model.depth=\[1,1,1\] model.num_heads=3"
    ):
        pinned(STORAGE, recipe(url, **changes), run)


def test_weights_are_named_in_one_way_and_by_a_recipe_that_is_made_for_them(tmp_path: Path) -> None:
    def run_of(name: str) -> RunDirectory:
        raise AssertionError(name)

    url = str(tmp_path / "own.safetensors")

    assert resolved_weights(STORAGE, recipe(""), url, run_of) == {"init_from": url}
    assert resolved_weights(STORAGE, recipe(""), "random", run_of) == {}
    assert resolved_weights(STORAGE, recipe(url), "", run_of) == {}
    with pytest.raises(RecipeError, match=r"--from: must name the weights"):
        resolved_weights(STORAGE, recipe(""), "", run_of)
    with pytest.raises(RecipeError, match=r"RECIPE: must be of a fine-tuning, got 'tiny'"):
        check_is_finetuning(named_recipe("tiny"))
