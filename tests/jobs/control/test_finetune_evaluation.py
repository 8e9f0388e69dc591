"""The recipe with which an evaluation fine-tunes."""

from __future__ import annotations

import re

import pytest

from jobs.control.finetune_evaluation import _run_name, finetuning_recipe
from jobs.errors import EvaluationError, RecipeError
from jobs.evaluate.evaluation import SamplePlan
from jobs.run.directory import RUN_NAME
from model import ConvMAEConfig

TINY = ConvMAEConfig.preset("tiny", image_size=64, kernel_size=7)


def test_it_trains_with_what_probes_learn_from_and_is_measured_on_what_they_are_tested_on() -> None:
    divided = finetuning_recipe("", TINY, SamplePlan("s3://b/data", labels="s3://b/l", test_ratio=0.3, seed=5), {})
    two = finetuning_recipe(
        "",
        TINY,
        SamplePlan("s3://b/test", "s3://b/train", labels="s3://b/t", train_labels="s3://b/l"),
        {"epochs": 7, "finetune.label_fraction": 0.05},
    )

    assert divided.name == "tiny_finetune" and divided.model == TINY
    part = divided.finetune
    assert part and (divided.data, part.labels, part.validation_data) == ("s3://b/data", "s3://b/l", "")
    assert (part.validation_ratio, part.split_seed) == (0.3, 5)
    part = two.finetune
    assert part and (two.data, part.labels) == ("s3://b/train", "s3://b/l")
    assert (part.validation_data, part.validation_labels, part.validation_ratio) == ("s3://b/test", "s3://b/t", 0)
    assert (two.epochs, part.label_fraction) == (7, 0.05)


@pytest.mark.parametrize(("preset", "name"), [("base", "convmae_base_finetune"), ("mae_base", "mae_base_finetune")])
def test_the_recipe_is_that_of_the_architecture(preset: str, name: str) -> None:
    assert finetuning_recipe("", ConvMAEConfig.preset(preset), SamplePlan("s3://b/data"), {}).name == name


def test_the_name_of_its_run_follows_from_what_is_trained_from_which_weights() -> None:
    recipe = finetuning_recipe("", TINY, SamplePlan("s3://b/data"), {})
    name = _run_name(recipe, "s3://b/runs/First run.safetensors")

    assert re.fullmatch(r"first-run-safetensors-finetune-[0-9a-f]{8}", name)
    assert _run_name(recipe.amended({"max_workers": 1}), "s3://b/runs/First run.safetensors") == name
    for field, value in (("epochs", 7), ("seed", 1), ("init_from", "s3://b/w.safetensors"), ("data", "s3://b/other")):
        assert _run_name(recipe.amended({field: value}), "s3://b/runs/First run.safetensors") != name, field
    for what in ("é/ü", "x" * 300, "random", "base-1@400"):
        assert RUN_NAME.fullmatch(_run_name(recipe, what)), what


def test_what_does_not_fit_is_refused() -> None:
    data = SamplePlan("s3://b/data")
    with pytest.raises(EvaluationError, match="--finetune-recipe: must be of a fine-tuning, got 'tiny'; give one"):
        finetuning_recipe("tiny", TINY, data, {})
    with pytest.raises(EvaluationError, match="--finetune-recipe: must be given for weights of this architecture"):
        finetuning_recipe("", ConvMAEConfig.preset("large"), data, {})
    with pytest.raises(EvaluationError, match="--samples: must not be given with --finetune"):
        finetuning_recipe("", TINY, SamplePlan("s3://b/data", most_samples=50), {})
    with pytest.raises(RecipeError, match=r"epoch: .*did you mean epochs"):
        finetuning_recipe("", TINY, data, {"epoch": 7})
