"""Sizes of images by epoch: what may be written, and what follows from it before a run starts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.errors import RecipeError
from jobs.recipe.cost import RecipeCost, steps_by_size
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.overrides import parse_overrides
from jobs.recipe.plan import IMAGENET, recipe_json, recipe_lines
from jobs.recipe.recipe import Recipe
from jobs.recipe.resolution import largest_resolution, resolution_at, resolutions_text
from jobs.recipe.sizing import (
    H100_FLOPS_PER_SECOND,
    NodeType,
    estimated_step_seconds,
    mean_step_seconds,
    timed_steps,
)
from model.cost import flops

BASE = named_recipe("convmae_base_400")
TINY = named_recipe("tiny")
NODE = NodeType(8, H100_FLOPS_PER_SECOND)


def scheduled(recipe: Recipe = BASE, **changes: Any) -> Recipe:
    return recipe.amended({"resolution_schedule": [[0, 160], [0.7, 224]], **changes})


def sizes(recipe: Recipe) -> list[tuple[int, int, tuple[int, int]]]:
    return [(each.first_epoch, each.stop_epoch, each.model.image_shape) for each in recipe.resolutions]


def test_without_a_schedule_all_epochs_have_the_models_size() -> None:
    assert sizes(BASE) == [(0, 400, (224, 224))]
    assert BASE.resolutions[0].model == BASE.model


def test_a_size_begins_after_its_share_of_the_epochs() -> None:
    recipe = BASE.amended(parse_overrides(["resolution_schedule=[[0, 160], [0.7, 224]]"]))

    assert sizes(recipe) == [(0, 280, (160, 160)), (280, 400, (224, 224))]
    found = [resolution_at(recipe.resolutions, epoch).model.image_shape[0] for epoch in (0, 279, 280, 399)]
    assert found == [160, 160, 224, 224]
    assert resolutions_text(recipe.resolutions) == "160x160; 224x224 from epoch 280"
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    ("epochs", "share", "first"),
    [(10, 0.7, 7), (10, 0.26, 3), (10, 0.24, 2), (10, 0.25, 3), (10, 0.35, 4), (3, 0.5, 2)],
)
def test_a_share_is_rounded_to_the_nearest_epoch_and_halves_upwards(epochs: int, share: float, first: int) -> None:
    recipe = scheduled(epochs=epochs, warmup_epochs=1, resolution_schedule=[[0, 160], [share, 224]])

    assert recipe.resolutions[1].first_epoch == first


def test_two_spellings_of_a_schedule_are_one_recipe() -> None:
    plain, wordy = scheduled(), scheduled(resolution_schedule=[[-0.0, [160, 160]], [0.7, (224, 224)]])

    assert plain == wordy and plain.digest() == wordy.digest() != BASE.digest()
    assert plain.to_json()["resolution_schedule"] == [[0.0, 160], [0.7, 224]]


def test_images_need_not_be_square_nor_only_grow() -> None:
    recipe = TINY.amended(
        {"model.image_size": [64, 96], "resolution_schedule": [[0, [96, 64]], [0.2, 128], [0.5, 48], [0.9, [64, 96]]]}
    )

    assert [each.model.image_shape for each in recipe.resolutions] == [(96, 64), (128, 128), (48, 48), (64, 96)]
    assert largest_resolution(recipe.resolutions).first_epoch == recipe.resolutions[1].first_epoch
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    ("schedule", "rule", "value", "remedy"),
    [
        (160, "must be a list of [share of epochs, image size]", 160, "resolution_schedule=[[0, 160], [0.7, 224]]"),
        ("160", "must be a list of [share of", "160", "or [] for one size"),
        ([160, 224], "must be a list of [share of", 160, "write resolution_schedule"),
        ([[0, 160, 1]], "must be a list of [share of", [0, 160, 1], "write"),
        ([[0, 160], [280, 224]], "have shares of the epochs, from 0 up to, but not including, 1", 280, "write 0.7"),
        ([[0, 160], [1, 224]], "not including, 1", 1, "write 0.7"),
        ([[0, 160], [-0.1, 224]], "not including, 1", -0.1, "write 0.7"),
        ([[0, 160], ["0.7", 224]], "not including, 1", "0.7", "write 0.7"),
        ([[False, 160], [0.7, 224]], "not including, 1", False, "write 0.7"),
        ([[0.1, 160], [0.7, 224]], "must begin with the share 0", [[0.1, 160], [0.7, 224]], "[[0, 160]"),
        ([[0, 160], [0.7, 192], [0.5, 224]], "ascending order, and 0.5 follows 0.7", None, "sort the entries"),
        ([[0, 160], [0.5, 192], [0.5, 224]], "ascending order, and 0.5 follows 0.5", None, "each share once"),
        ([[0, 160], [0.5, 160], [0.7, 224]], "change the size with each entry, and 160 follows 160", None, "of 0.5"),
        ([[0, 224]], "two sizes or more, or none", [[0.0, 224]], "set resolution_schedule=[]"),
        ([[0, 160], [0.7, 192]], "must end with model.image_size = 224", None, "or model.image_size"),
        ([[0, 150], [0.7, 224]], "image_size each side must be a multiple of 16", 150, "use 144 in place of 150, or"),
        ([[0, 16], [0.7, 224]], "mask_ratio must keep at least one of 1 patches", 16, "larger images"),
        ([[0, -16], [0.7, 224]], "image_size must be a positive whole number", -16, "or another size"),
        ([[0, 32768], [0.7, 224]], "at most 16384", 32768, "use 16384 or less"),
        ([[0, 160.0], [0.7, 224]], "sizes in pixels, a whole number or [height, width]", 160.0, "write"),
        ([[0, [160]], [0.7, 224]], "sizes in pixels, a whole number or [height, width]", [160], "write"),
        ([[0, 160], [0.9999, 224]], "leave each size an epoch of the 400, and 224 of 0.9999 has none", None, "below 1"),
        ([[0, 160], [0.5, 192], [0.5001, 224]], "and 192 of 0.5 has none", None, "farther apart"),
        ([[0, 160], [0.001, 224]], "and 160 of 0 has none", None, "farther apart"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused_by_name(schedule: Any, rule: str, value: Any, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        scheduled(resolution_schedule=schedule)

    error = caught.value
    assert error.field == "resolution_schedule"
    assert rule in error.rule and remedy in error.remedy
    assert value is None or error.value == value


def test_a_size_whose_patches_views_do_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"resolution_schedule: .*views must divide the 25 patches .* got 80; "):
        TINY.amended({"model.views": 4, "resolution_schedule": [[0, 80], [0.5, 128]]})


def test_a_run_of_too_few_epochs_is_refused_rather_than_never_reaching_the_last_size() -> None:
    with pytest.raises(RecipeError, match=r"leave each size an epoch of the 1, and 224 of 0.7 has none"):
        scheduled(epochs=1, warmup_epochs=0)


def test_a_fine_tuning_has_one_size() -> None:
    with pytest.raises(RecipeError, match=r"resolution_schedule: must be empty in a fine-tuning.*=\[\]"):
        named_recipe("tiny_finetune").amended({"resolution_schedule": [[0, 64], [0.5, 128]]})


def test_steps_cost_what_images_of_their_size_cost() -> None:
    recipe = scheduled()
    small, large = (flops(each.model, recipe.grain).training / recipe.grain for each in recipe.resolutions)

    parts = steps_by_size(recipe, steps_per_epoch=10, total_steps=4000)

    assert [(each.steps, each.cost.training_flops) for each in parts] == [
        (range(2800), small),
        (range(2800, 4000), large),
    ]
    assert 0.4 < small / large < 0.51, "a little below the share of the patches, by attention"
    assert {each.cost.parameters for each in parts} == {RecipeCost.of(BASE).parameters}
    assert [each.steps for each in steps_by_size(recipe, 10, 7)] == [range(7)]
    (whole,) = steps_by_size(BASE, 10, 4000)
    assert (whole.steps, whole.cost) == (range(4000), RecipeCost.of(BASE))


def test_the_plan_names_each_size_and_what_is_saved() -> None:
    recipe = scheduled()
    steps = 1_281_167 // recipe.global_batch_size

    lines, of_one = dict(recipe_lines(recipe, IMAGENET)), dict(recipe_lines(BASE, IMAGENET))
    fields = recipe_json(recipe, IMAGENET)

    assert lines["resolution_schedule"] == "[[0.0, 160], [0.7, 224]]"
    assert lines["  224x224"] == f"from epoch 280, {120 * steps:,} steps: {of_one['FLOPs per image']}"
    assert lines["  160x160"].startswith(f"from epoch 0, {280 * steps:,} steps: ")
    small, large = (each["training_flops_per_image"] for each in fields["resolutions"])
    share = (0.7 * small + 0.3 * large) / large
    assert lines["training FLOPs"].endswith(f", {share:.1%} of those with one size")
    whole = float(of_one["training FLOPs"].split()[0])
    assert float(lines["training FLOPs"].split()[0]) == pytest.approx(share * whole, rel=1e-3)
    assert fields["resolutions"][1] == {
        "image_size": [224, 224],
        "first_epoch": 280,
        "steps": 120 * steps,
        "training_flops_per_image": fields["training_flops_per_image"],
    }
    assert "resolutions" not in recipe_json(BASE, IMAGENET)


def test_a_run_takes_as_long_as_its_steps_of_each_size() -> None:
    timed = timed_steps(scheduled(), NODE, 2, steps_per_epoch=10, total_steps=4000)
    measured = timed_steps(scheduled(), NODE, 2, steps_per_epoch=10, total_steps=4000, measured=1.2)

    whole = estimated_step_seconds(BASE, NODE, 2)
    assert [each.steps for each in timed] == [2800, 1200]
    assert timed[1].step_seconds == whole and 0.4 * whole < timed[0].step_seconds < 0.55 * whole
    assert mean_step_seconds(timed) == pytest.approx(0.7 * timed[0].step_seconds + 0.3 * whole)
    assert measured[1].step_seconds == 1.2
    assert measured[0].step_seconds / 1.2 == pytest.approx(timed[0].step_seconds / whole)
    (plain,) = timed_steps(BASE, NODE, 2, steps_per_epoch=10, total_steps=4000, measured=1.2)
    assert mean_step_seconds([plain]) == 1.2
