"""Specs: what they ask for, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.ablate.estimate import estimates
from jobs.ablate.spec import Spec, spec_names
from jobs.errors import AblationError, RecipeError
from jobs.recipe.cost import steps_by_size
from pipeline.store.storage import Storage

OF_SOURCE = ("epochs", "masking", "kernel", "fusion", "mae", "loss")
SHIPPED = (*OF_SOURCE, "resolution")
SOURCE = "review of arXiv:2205.03892 by Zheng, 2022-11-25"
README = "README of github.com/Alpha-VL/ConvMAE"
EPOCHS = f"arXiv:2205.03892; epochs: {README}"
# The review: 85.0 % (+1.4), AP 53.2 (+2.9), mIoU 51.7 (+3.6), each against MAE-Base. The README: probing, epochs.
FIGURES = {
    "mae": {
        ("mae", "top-1, fine-tuned", 83.6, f"{SOURCE}: ConvMAE's 85.0, less 1.4"),
        ("convmae", "top-1, fine-tuned", 85.0, SOURCE),
        ("mae", "top-1, linear probing", 67.8, README),
        ("convmae", "top-1, linear probing", 70.9, README),
        ("mae", "COCO box AP", 50.3, f"{SOURCE}: ConvMAE's 53.2, less 2.9"),
        ("convmae", "COCO box AP", 53.2, SOURCE),
        ("mae", "ADE20K mIoU", 48.1, f"{SOURCE}: ConvMAE's 51.7, less 3.6"),
        ("convmae", "ADE20K mIoU", 51.7, SOURCE),
    },
    "epochs": {("epochs-1600", "top-1, fine-tuned", 85.0, EPOCHS)},
    "fusion": {("epochs-1600_fusion-true", "top-1, fine-tuned", 85.0, EPOCHS)},
}


HUNDRED = list(range(1, 101))


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_every_ablation_of_the_source_is_shipped_at_full_size_and_small() -> None:
    assert spec_names() == sorted([*SHIPPED, *(f"{name}_small" for name in SHIPPED), "source_small"])
    varied = {
        name: sorted(str(list(variant.changes.values())) for variant in Spec.load(name).variants)
        for name in ("epochs", "masking", "kernel", "fusion")
    }
    assert varied == {
        "epochs": ["[1600]", "[200]", "[400]", "[800]"],
        "masking": ["['block']", "['random']"],
        "kernel": ["[5]", "[7]", "[9]"],
        "fusion": ["[1600, False]", "[1600, True]", "[200, False]", "[200, True]"],
    }
    assert [variant.base for variant in Spec.load("mae").variants] == ["mae_base", "convmae_base"]


@pytest.mark.parametrize("name", [*SHIPPED, *(f"{name}_small" for name in SHIPPED), "source_small"])
def test_figures_of_others_are_those_of_their_sources(name: str) -> None:
    figures = {(one.variant, one.measure, one.value, one.source) for one in Spec.load(name).file.paper}

    assert figures == FIGURES.get(name, set())


@pytest.mark.parametrize("name", [f"{name}_small" for name in (*SHIPPED, "source")])
def test_small_specs_train_on_two_cores_for_less_than_two_hours(name: str) -> None:
    found = estimates(Storage(), Spec.load(name)).values()

    assert {one.images for one in found} == {20_000}
    assert sum(one.hours for one in found) / 2 < 1.75  # the rest is for evaluations and starts


@pytest.mark.parametrize("name", ["resolution", "resolution_small"])
def test_a_schedule_of_sizes_is_compared_at_the_same_epochs_and_at_the_same_cost(name: str) -> None:
    recipes = {trial.variant.name: trial.recipe for trial in Spec.load(name).trials}
    flops = {
        variant: sum(len(part.steps) * part.cost.training_flops for part in steps_by_size(recipe, 1, recipe.epochs))
        for variant, recipe in recipes.items()
    }

    assert recipes["growing"].epochs == recipes["plain"].epochs
    assert 0.64 < flops["growing"] / flops["plain"] < 0.67
    assert flops["plain-as-costly"] == pytest.approx(flops["growing"], rel=0.002 if name == "resolution" else 0.07)


def test_runs_have_names_that_do_not_change(tmp_path: Path) -> None:
    spec = Spec.load(
        written(tmp_path, 'base = "tiny"\nseeds = [3, 1]\n[grid]\nepochs = [5, 9]\nmodel.fusion = [true, false]\n')
    )

    assert [trial.run_name for trial in spec.trials] == [
        "mine-epochs-5_fusion-true-seed3", "mine-epochs-5_fusion-true-seed1",
        "mine-epochs-5_fusion-false-seed3", "mine-epochs-5_fusion-false-seed1",
        "mine-epochs-9_fusion-true-seed3", "mine-epochs-9_fusion-true-seed1",
        "mine-epochs-9_fusion-false-seed3", "mine-epochs-9_fusion-false-seed1",
    ]  # fmt: skip
    assert [trial.recipe.seed for trial in spec.trials[:2]] == [3, 1]
    assert (spec.trials[-1].recipe.epochs, spec.trials[-1].recipe.model.fusion) == (9, False)


def test_what_is_typed_changes_recipes_evaluation_and_seeds(tmp_path: Path) -> None:
    spec = Spec.load("kernel", ["data=s3://b/d", "evaluation.data=s3://b/e", "evaluation.samples=9", "seeds=[4]"])

    assert {trial.recipe.data for trial in spec.trials} == {"s3://b/d"}
    assert (spec.file.evaluation.data, spec.file.evaluation.samples) == ("s3://b/e", 9)
    assert [trial.seed for trial in spec.trials] == [4, 4, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('base = "tiny"\nsead = [1]', "did you mean seeds?"),
        ('base = "tiny"\n[evaluation]\nsampels = 1', "did you mean samples?"),
        ('base = "tiny"\nevaluation.kind = "finetune"', "convmae finetune"),
        ('base = "tiny"\nseeds = [1, 1]', "must be distinct"),
        ('base = "tiny"\nseeds = []', "must be distinct"),
        ('base = "tiny"\ngrid.epochs = 5', "must be a list of values"),
        ('base = "tiny"\nname = "Mine"', "must make names of runs"),
        ('base = "tiny"\n[[variants]]\nname = "a"\n[[variants]]\nname = "a"', "names of their own"),
        ('base = "tiny"\n[[statements]]\ntext = "x"\nsource = "y"\nrising = ["base", "bass"]', "did you mean base?"),
        ('base = "tiny"\n[[statements]]\ntext = "x"\nsource = "y"', "either `rising` or `similar`"),
        ("seeds = [1]", "base: is required"),
        (f'base = "tiny"\ngrid = {{epochs = {HUNDRED}, lanes = {HUNDRED}, max_steps = {HUNDRED}}}', "got 3000000"),
        ('base = "tiny"\n"" = 1', "'': is not a key of a spec"),
    ],
)
def test_a_fault_of_a_spec_is_named_with_its_remedy(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(AblationError) as caught:
        Spec.load(written(tmp_path, text))
    assert words in str(caught.value)


@pytest.mark.parametrize("overrides", [["model.kernel_size=7"], ["seed=1"], ["name=x"]])
def test_what_the_spec_varies_is_not_given(overrides: list[str]) -> None:
    with pytest.raises(AblationError, match="is what the spec varies"):
        Spec.load("kernel", overrides)


def test_every_recipe_is_validated_and_the_variant_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"kernel_size-8: model.kernel_size: must be odd"):
        Spec.load(written(tmp_path, 'base = "tiny"\ngrid.model.kernel_size = [5, 8]'))
    with pytest.raises(RecipeError, match="did you mean epochs"):
        Spec.load(written(tmp_path, 'base = "tiny"\ngrid.epoch = [5, 8]'))
    with pytest.raises(AblationError, match="did you mean kernel"):
        Spec.load("kernal")
