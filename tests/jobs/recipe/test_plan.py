from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.errors import RecipeError
from jobs.recipe.named_recipes import named_recipe, recipe_names
from jobs.recipe.plan import IMAGENET, DatasetSize, recipe_json, recipe_lines
from jobs.recipe.recipe import Recipe
from model import ConvMAE
from model.cost import flops
from pipeline.errors import DatasetError, OrderError
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage

MANIFEST = Manifest(
    2,
    "digest",
    ("cat", "dog"),
    3,
    ShardTable.of([ShardEntry("a", 600, 6000, "ab" * 32), ShardEntry("b", 425, 4250, "cd" * 32)]),
)


def lines(recipe: Recipe, size: DatasetSize = IMAGENET) -> dict[str, str]:
    return dict(recipe_lines(recipe, size))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_plan_with_all_its_fields(name: str) -> None:
    recipe = named_recipe(name)

    fields = lines(recipe)

    written = recipe.to_json()
    assert set(written) - {"model", "finetune"} <= set(fields)
    for part in ("model", "finetune"):
        assert {f"{part}.{field}" for field in written[part] or ()} <= set(fields)


def test_the_plan_of_base_is_that_of_the_paper() -> None:
    recipe = named_recipe("convmae_base")
    images = 312 * 4096

    fields = lines(recipe)

    assert fields["steps per epoch"] == "312"
    assert fields["total steps"] == f"{1600 * 312:,}"
    assert fields["warm-up steps"] == f"{40 * 312:,}"
    assert fields["images per epoch"].startswith(f"{images:,} ({1_281_167 - images:,} rest")
    assert fields["bytes per epoch"] == f"{IMAGENET.bytes * images / IMAGENET.samples / 1e9:.0f} GB"
    per_image = flops(recipe.model, recipe.micro_batch_size).training / recipe.micro_batch_size
    exaflops = per_image * 1600 * images / 1e18
    assert fields["training FLOPs"] == f"{exaflops:.3f} EFLOP"
    assert "ImageNet" in fields["data set"]


def test_the_plan_of_complementary_masking_counts_every_mask_of_an_image() -> None:
    recipe, plain = named_recipe("fastconvmae_base"), named_recipe("convmae_base_official")

    fields, of_one = lines(recipe), lines(plain)

    forward, whole = (flops(plain.model, 64).forward.total / 64, flops(plain.model, 64).training / 64)
    assert fields["FLOPs per image"] == f"{4 * forward / 1e9:.2f} G forward, {4 * whole / 1e9:.2f} G with backward"
    assert fields["masks per image"] == "4, each patch visible in one; 64 in a micro-batch of 16"
    assert fields["total steps"] == f"{50 * (1_281_167 // 512):,}"
    assert fields["training FLOPs"] == f"{4 * whole * 50 * (1_281_167 // 512) * 512 / 1e18:.3f} EFLOP"
    assert fields["parameters"] == of_one["parameters"]
    assert "masks per image" not in of_one
    assert recipe_json(recipe, IMAGENET)["training_flops_per_image"] == pytest.approx(4 * whole, abs=1)


def test_parameters_are_those_of_the_model() -> None:
    recipe = named_recipe("tiny")
    model = ConvMAE(recipe.model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    assert lines(recipe)["parameters"].startswith(f"{trained / 1e6:.2f} M")


def test_max_steps_cuts_the_plan() -> None:
    assert lines(named_recipe("tiny").amended({"max_steps": 7}))["total steps"] == "7"


def test_a_data_set_is_measured_by_its_manifest(tmp_path: Path) -> None:
    MANIFEST.save(Storage(), str(tmp_path), [])
    recipe = named_recipe("tiny").amended({"data": str(tmp_path)})

    size = DatasetSize.of(Storage(), recipe)

    assert size == DatasetSize(1025, 10250, str(tmp_path), np.array([600, 425]))
    assert lines(recipe, size)["steps per epoch"] == str(1025 // recipe.global_batch_size)
    assert lines(recipe, size)["samples"].startswith("1,025 ")


def test_without_a_data_set_imagenet_is_assumed() -> None:
    assert DatasetSize.of(Storage(), named_recipe("tiny")) is IMAGENET


def test_a_data_set_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"must hold a manifest\.json"):
        DatasetSize.of(Storage(), named_recipe("tiny").amended({"data": str(tmp_path)}))


def test_a_data_set_that_is_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(OrderError, match="samples: must be at least global_batch_size 64"):
        lines(named_recipe("tiny"), DatasetSize(63, 1000, "small", np.array([63])))


def test_an_impossible_recipe_never_gets_a_plan() -> None:
    with pytest.raises(RecipeError):
        lines(named_recipe("tiny").amended({"lanes": 7}))


def test_the_plan_says_how_batches_mix_and_what_an_epoch_requests() -> None:
    fields = lines(named_recipe("convmae_base").amended({"lanes": 64, "max_workers": 64}))

    assert fields["design effect"].startswith("1.87 over shards")
    assert fields["open window"] == "131,072 samples, 15.1 GB over all ranks, 236 MB on one of 64"
    assert fields["GETs per epoch"].endswith("(whole blocks)")
    blocks, requests = 40_036, int(fields["GETs per epoch"].split()[0].replace(",", ""))
    assert blocks < requests < 1.04 * blocks
    one = lines(named_recipe("convmae_base").amended({"max_workers": 1}))
    assert one["GETs per epoch"].startswith(f"{312 * 4096:,} (sample by sample")


def test_the_plan_in_json_is_that_of_the_lines() -> None:
    recipe = named_recipe("convmae_base")

    fields = recipe_json(recipe, IMAGENET)

    assert fields["recipe"] == recipe.to_json()
    assert fields["total_steps"] == 1600 * 312
    assert fields["plan"]["steps_per_epoch"] == 312
    assert lines(recipe)["design effect"].startswith(f"{fields['plan']['design_effect']:.2f}")


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The ViT-Base of 85.80 M parameters that MAE fine-tunes, and 0.77 M of a head for ImageNet (arXiv:2111.06377).
    [("mae_base_finetune", "86.57 M (encoder 85.80 M)"), ("mae_base_linear", "0.77 M (frozen 85.80 M)")],
)
def test_the_plan_of_a_fine_tuning_is_of_its_classifier(name: str, parameters: str) -> None:
    recipe = named_recipe(name)
    size = IMAGENET.only(IMAGENET.shard_samples, 1000)

    fields = lines(recipe, size)

    assert fields["parameters"] == parameters
    assert fields["classes"] == "1,000"
    # 17.5 G multiply-adds of a ViT-Base at 224x224 (arXiv:2106.10270, table 1), norms and softmax not counted.
    assert fields["FLOPs per image"].startswith("35.1")
    assert recipe_json(recipe, size)["classes"] == 1000


def test_a_part_of_a_data_set_is_planned_as_if_it_were_all() -> None:
    size = DatasetSize(1025, 10250, "s3://b/data", np.array([600, 0, 425]))

    part = size.only(np.array([150, 0, 55]), 2)

    assert part == DatasetSize(205, 2050, "s3://b/data; 205 of 1,025 samples are trained with", part.shard_samples, 2)
    assert part.shard_samples.tolist() == [150, 55]
    fields = lines(
        named_recipe("tiny_finetune").amended({"global_batch_size": 40, "lanes": 4, "micro_batch_size": 10}), part
    )
    assert fields["steps per epoch"] == "5"
    assert fields["samples"].startswith("205 ")
