from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jobs.errors import RecipeError
from jobs.recipe.named_recipes import named_recipe, recipe_names
from model import ConvMAEConfig


def test_the_promised_names_exist() -> None:
    sizes = {f"convmae_{size}" for size in ("small", "base", "large", "huge")}
    shorter = {f"convmae_base_{epochs}" for epochs in (200, 400, 800)}

    kinds = ("finetune", "linear")
    tuned = {f"{model}_{kind}" for model in ("convmae_base", "mae_base", "tiny") for kind in kinds}

    others = {"tiny", "convmae_base_official", "fastconvmae_base", "mae_base"}
    assert set(recipe_names()) == others | sizes | shorter | tuned
    assert all(named_recipe(name).name == name for name in recipe_names())


def test_base_is_the_papers_recipe_with_raw_pixels() -> None:
    recipe = named_recipe("convmae_base")

    assert recipe.model == ConvMAEConfig.preset("base", loss="l1", norm_pix=False)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.global_batch_size) == (1600, 40, 4096)
    assert (recipe.base_learning_rate, recipe.weight_decay, recipe.model.mask_ratio) == (1.5e-4, 0.05, 0.75)


def test_official_differs_from_base_in_its_loss_alone() -> None:
    base, official = named_recipe("convmae_base"), named_recipe("convmae_base_official")

    assert (official.model.loss, official.model.norm_pix) == ("mse", True)
    assert official.amended({"name": base.name, "model.loss": "l1", "model.norm_pix": False}) == base


def test_complementary_masking_is_that_of_fastconvmae() -> None:
    recipe, official = named_recipe("fastconvmae_base"), named_recipe("convmae_base_official")

    # PRETRAIN.md: --nodes 1 of 8 GPUs, --batch_size 64, --blr 6e-4, --norm_pix_loss; main_pretrain.py.
    assert dataclasses.replace(recipe.model, views=1) == official.model
    assert (recipe.model.views, recipe.model.mask_ratio, recipe.model.kept) == (4, 0.75, 49)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.global_batch_size) == (50, 10, 8 * 64)
    assert (recipe.base_learning_rate, recipe.weight_decay) == (6e-4, 0.05)
    assert recipe.learning_rate == pytest.approx(1.2e-3)
    # As many masks at once as a micro-batch of the others has.
    assert recipe.micro_batch_size * recipe.model.views == official.micro_batch_size
    assert recipe.grain * recipe.model.views == official.grain


def test_the_baseline_differs_from_official_in_the_model_alone() -> None:
    official, baseline = named_recipe("convmae_base_official"), named_recipe("mae_base")

    assert baseline.model == ConvMAEConfig.preset("mae_base", loss="mse", norm_pix=True)
    assert baseline.to_json() | {"name": "", "model": {}} == official.to_json() | {"name": "", "model": {}}


@pytest.mark.parametrize("epochs", [200, 400, 800])
def test_shorter_recipes_differ_from_base_in_their_epochs_alone(epochs: int) -> None:
    base = named_recipe("convmae_base")

    assert named_recipe(f"convmae_base_{epochs}") == base.amended({"name": f"convmae_base_{epochs}", "epochs": epochs})


@pytest.mark.parametrize("size", ["small", "base", "large", "huge"])
def test_sizes_differ_in_the_model_alone(size: str) -> None:
    base, recipe = named_recipe("convmae_base"), named_recipe(f"convmae_{size}")

    assert recipe.model == ConvMAEConfig.preset(size, loss="l1", norm_pix=False)
    assert recipe.to_json() | {"name": "", "model": {}} == base.to_json() | {"name": "", "model": {}}


@pytest.mark.parametrize("name", ["convmae_base_finetune", "mae_base_finetune"])
def test_finetuning_is_the_papers(name: str) -> None:
    recipe = named_recipe(name)
    part = recipe.finetune

    # FINETUNE.md and main_finetune.py of the official code.
    assert part
    assert (recipe.epochs, recipe.warmup_epochs, recipe.global_batch_size) == (100, 5, 1024)
    assert (recipe.base_learning_rate, recipe.weight_decay, part.min_learning_rate) == (5e-4, 0.05, 1e-6)
    assert (part.layer_decay, part.drop_path, part.label_smoothing) == (0.65, 0.1, 0.1)
    assert (part.mixup, part.cutmix, part.erasing) == (0.8, 1.0, 0.25)
    assert (part.randaugment_operations, part.randaugment_magnitude) == (2, 9)


@pytest.mark.parametrize(("name", "batch"), [("convmae_base_linear", 4096), ("mae_base_linear", 16384)])
def test_linear_probing_is_that_of_the_official_code(name: str, batch: int) -> None:
    recipe = named_recipe(name)
    part = recipe.finetune

    # main_linprobe.py, and the batches of FINETUNE.md and of MAE's FINETUNE.md.
    assert part
    assert (part.kind, part.optimizer, recipe.weight_decay) == ("linear", "lars", 0)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.global_batch_size) == (90, 10, batch)
    assert (recipe.base_learning_rate, part.min_learning_rate) == (0.1, 0)
    assert (part.randaugment_operations, part.mixup, part.cutmix, part.erasing, part.label_smoothing) == (0, 0, 0, 0, 0)


def test_the_demonstration_needs_no_gpu() -> None:
    tiny = named_recipe("tiny")

    assert (tiny.device, tiny.precision) == ("cpu", "fp32")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean convmae_base"):
        named_recipe("convmae_bas")


def test_a_file_amends_the_recipe_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "tiny"\nepochs = 41\nwarmup_epochs = 2\n\n[model]\nmask_ratio = 0.5\n')

    recipe = named_recipe(str(path))

    expected = {"name": "mine", "epochs": 41, "warmup_epochs": 2.0, "model.mask_ratio": 0.5}
    assert recipe == named_recipe("tiny").amended(expected)


def test_a_file_may_name_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "tiny"\nname = "other"\n')

    assert named_recipe(str(path)).name == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = tiny", "recipe: must be a readable TOML file"),
        ("epochs = 3", "base: must name the recipe"),
        ("base = 3", "base: must name the recipe"),
        ('base = "other.toml"', "base: must name the recipe"),
        ('base = "tinny"', "did you mean tiny"),
        ('base = "tiny"\nepoch = 3', "did you mean epochs"),
        ('base = "tiny"\nmodel = "base"', "model: must be set field by field"),
        ('base = "tiny"\n[model]\nmask = 0.5', r"did you mean model\.mask"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)

    with pytest.raises(RecipeError, match=message) as caught:
        named_recipe(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")

    for name in ("absent.toml", "binary.toml"):
        with pytest.raises(RecipeError, match="must be a readable TOML file"):
            named_recipe(str(tmp_path / name))


def test_a_file_may_begin_as_windows_editors_begin_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b'base = "tiny"\r\nepochs = 3\r\n')

    assert named_recipe(str(path)).epochs == 3
