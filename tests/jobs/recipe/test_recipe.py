from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from jobs.errors import RecipeError
from jobs.recipe import finetune
from jobs.recipe.image_statistics import IMAGENET_MEAN, IMAGENET_STD
from jobs.recipe.named_recipes import named_recipe, recipe_names
from jobs.recipe.overrides import parse_overrides
from jobs.recipe.placement import PLACEMENT_FIELDS
from jobs.recipe.recipe import Recipe, difference
from model import ConvMAEConfig

TINY = named_recipe("tiny")
FINETUNE = named_recipe("tiny_finetune")

# Another value for every field, so that what a digest covers is shown field by field.
OTHER_VALUES: dict[str, Any] = {
    "name": "other",
    "data": "s3://bucket/other",
    "init_from": "s3://bucket/weights.safetensors",
    "init_sha256": "ab" * 32,
    "run_root": "s3://bucket/runs",
    "model.mask_ratio": 0.6,
    "model.views": 4,
    "model.in_channels": 1,
    "finetune.kind": "linear",
    "finetune.labels": "s3://bucket/labels.txt",
    "finetune.label_fraction": 0.05,
    "finetune.split_seed": 1,
    "finetune.classes": ["cat", "dog"],
    "finetune.samples_sha256": "ab" * 32,
    "finetune.validation_ratio": 0.1,
    "finetune.validate_epochs": 7,
    "finetune.least_crop": 0.2,
    "finetune.randaugment_operations": 1,
    "finetune.randaugment_magnitude": 7.0,
    "finetune.erasing": 0.5,
    "finetune.mixup": 0.3,
    "finetune.cutmix": 0.4,
    "finetune.label_smoothing": 0.2,
    "finetune.drop_path": 0.2,
    "finetune.layer_decay": 0.75,
    "finetune.min_learning_rate": 1e-7,
    "epochs": 50,
    "resolution_schedule": [[0, 64], [0.5, 128]],
    "max_steps": 7,
    "warmup_epochs": 1.5,
    "base_learning_rate": 1e-3,
    "weight_decay": 0.1,
    "clip_grad_norm": 1.0,
    "global_batch_size": 128,
    "micro_batch_size": 16,
    "reproducible": "rounding",
    "grain_size": 4,
    "digest_every_steps": 7,
    "lanes": 4,
    "block_samples": 4,
    "window_blocks": 4,
    "seed": 1,
    "scaled_decode": True,
    "precision": "bf16",
    "zero_stage": 2,
    "recompute": ["stage1", "decoder"],
    "compile": True,
    "device": "cuda",
    "min_workers": 2,
    "max_workers": 4,
    "cpus_per_worker": 1.0,
    "loader_threads": 2,
    "loader_processes": True,
    "on_bad_sample": "skip",
    "max_consecutive_bad_samples": 7,
    "check_etags": False,
    "cache_dir": "/var/cache/convmae",
    "cache_bytes": 10**9,
    "stall_seconds": 60.0,
    "hang_seconds": 30.0,
    "resize_seconds": 30.0,
    "standby": False,
    "preflight": False,
    "straggler_factor": 3.0,
    "leave_out_stragglers": True,
    "verify_steps_every": 50,
    "on_nonfinite_loss": "skip_batch",
    "max_nonfinite_in_a_row": 3,
    "checkpoint_interval": "auto",
    "checkpoint_every_steps": 10,
    "checkpoint_every_seconds": 30.0,
    "checkpoint_min_seconds": 10.0,
    "checkpoint_max_seconds": 1000.0,
    "keep_checkpoints": 1,
    "memory_checkpoint_every_steps": 5,
    "on_damaged_checkpoint": "fail",
    "milestone_epochs": [10],
    "max_restarts_without_progress": 9,
    "probes": False,
    "probe_data": "s3://bucket/labelled",
    "probe_labels": "s3://bucket/labels.txt",
    "probe_epochs": 5,
    "probe_samples": 100,
    "probe_wait_seconds": 0.0,
    "metrics_port": 9000,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_bits": 16,
    "tracker": ["tensorboard", "mlflow"],
    "notify_url": "env:CONVMAE_NOTIFY_URL",
    "notify_format": "slack",
}


def refused(overrides: dict[str, Any]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        TINY.amended(overrides)
    return caught.value


def test_every_field_has_another_value_below() -> None:
    assert {key.partition(".")[0] for key in OTHER_VALUES} == set(Recipe.model_fields)


def test_resuming_may_change_how_a_run_executes_and_nothing_else() -> None:
    workers = {
        "min_workers",
        "max_workers",
        "cpus_per_worker",
        "loader_threads",
        "loader_processes",
        "micro_batch_size",
    }
    computing = {"recompute", "compile", "on_nonfinite_loss", "max_nonfinite_in_a_row"}
    interval = {"interval", "every_steps", "every_seconds", "min_seconds", "max_seconds"}
    saving = {
        *(f"checkpoint_{name}" for name in interval),
        "keep_checkpoints",
        "memory_checkpoint_every_steps",
        "on_damaged_checkpoint",
        "digest_every_steps",
    }
    watching = {"max_restarts_without_progress", "metrics_port", "hang_seconds", "resize_seconds", "standby"}
    watching |= {"preflight", "straggler_factor", "leave_out_stragglers", "verify_steps_every"}

    reading = {
        "on_bad_sample",
        "max_consecutive_bad_samples",
        "check_etags",
        "cache_dir",
        "cache_bytes",
        "stall_seconds",
    }

    probing = {"probes", *(f"probe_{name}" for name in ("data", "labels", "epochs", "samples", "wait_seconds"))}

    telling = {"tracker", "notify_url", "notify_format"}

    known = workers | computing | saving | watching | reading | probing | telling
    assert known | {"run_root", "max_steps"} == PLACEMENT_FIELDS
    assert set(Recipe.model_fields) >= PLACEMENT_FIELDS


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_field_changes_the_digest_unless_it_is_placement(key: str) -> None:
    before = FINETUNE if key.startswith("finetune.") else TINY
    if key in ("image_mean", "image_std"):  # one is not given without the other
        before = TINY.with_statistics(IMAGENET_MEAN, IMAGENET_STD)
    changed = before.amended({key: OTHER_VALUES[key]})
    is_placement = key in PLACEMENT_FIELDS | {f"finetune.{name}" for name in finetune.PLACEMENT_FIELDS}

    assert changed != before
    assert (changed.digest() == before.digest()) == is_placement
    assert (changed.trajectory() == before.trajectory()) == is_placement


BEFORE = {"model.norm_pix": False, "base_learning_rate": 4e-3}
"""What `tiny` trained with once."""


@pytest.mark.parametrize(
    ("name", "changes", "digest"),
    [
        ("tiny", BEFORE, "2c5541eb1b14c27d9e81ab3d0a65c9a71b11f122447efb9f01ae42795804f78d"),
        ("convmae_base", {}, "fabd908257856c2c7d2f9b588db3262d9a40d3bad78bb30a8af45a7b5bf5d7a6"),
        ("mae_base", {}, "51ecf83456faeafb24aba836692b1b767c881fd7305f97607155235a3bd890fe"),
    ],
)
def test_a_pretraining_has_the_digest_that_it_had_before_there_were_probes_and_finetunings(
    name: str, changes: dict[str, object], digest: str
) -> None:
    assert named_recipe(name).amended(changes).digest() == digest


def test_imagenets_statistics_are_what_runs_were_before_there_were_others() -> None:
    given = TINY.with_statistics(IMAGENET_MEAN, IMAGENET_STD)

    assert given.trajectory() == TINY.trajectory()
    assert TINY.statistics == given.statistics == (IMAGENET_MEAN, IMAGENET_STD)
    assert "image_mean" in given.with_statistics((0.5,) * 3, (0.5,) * 3).to_json()


def test_a_recipe_keeps_the_statistics_that_it_has() -> None:
    own = TINY.amended({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})

    assert own.with_statistics(IMAGENET_MEAN, IMAGENET_STD) is own
    assert own.statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Recipe.from_json(own.to_json()) == own


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("tiny")])
def test_recipes_of_papers_normalise_as_those_did(name: str) -> None:
    assert (named_recipe(name).image_mean, named_recipe(name).image_std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("mean", "std", "field"),
    [
        ([0.5] * 3, [], "image_std"),
        ([], [0.5] * 3, "image_std"),
        ([0.5], [0.5], "image_mean"),
        ([0.5, 0.5, 1.5], [0.5] * 3, "image_mean"),
        ([0.5] * 3, [0.5, 0.0, 0.5], "image_std"),
        ([124, 116, 104], [58, 57, 57], "image_mean"),
    ],
)
def test_statistics_that_cannot_be_are_refused(mean: list[float], std: list[float], field: str) -> None:
    assert refused({"image_mean": mean, "image_std": std}).field == field


def test_a_model_of_gray_images_has_one_mean_and_deviation() -> None:
    gray = TINY.amended({"model.in_channels": 1, "image_mean": [0.4], "image_std": [0.2]})

    assert gray.statistics == ((0.4,), (0.2,))
    with pytest.raises(RecipeError, match=r"image_mean: must have a number for each channel, 1, .*image_mean=\[\]"):
        named_recipe("convmae_base").amended({"model.in_channels": 1})


@pytest.mark.parametrize(
    "kind", [{"image_bits": 16}, {"model.in_channels": 1, "image_bits": 16}, {"model.in_channels": 5}]
)
def test_images_that_are_no_photographs_are_part_of_what_a_run_computes(kind: dict[str, int]) -> None:
    given = TINY.amended(kind)

    assert given.digest() != TINY.digest() and Recipe.from_json(given.to_json()) == given
    with pytest.raises(RecipeError, match=r"finetune.randaugment_operations: must be 0 with images of \d channels of"):
        named_recipe("tiny_finetune").amended({**kind, "finetune.randaugment_operations": 2})


def test_images_of_16_bits_are_not_normalised_as_photographs() -> None:
    assert "image_bits" not in TINY.trajectory()
    with pytest.raises(
        RecipeError, match=r"image_mean: must not be ImageNet's with images of 16 bits, .*image_mean=\[\]"
    ):
        named_recipe("convmae_base").amended({"image_bits": 16})
    with pytest.raises(RecipeError, match="image_bits"):
        TINY.amended({"image_bits": 12})


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"finetune.optimizer": "lars"}, "finetune.optimizer"),
        ({"finetune.mixup": 0.8, "lanes": 64, "grain_size": 1}, "finetune.mixup and cutmix"),
        ({"finetune.validation_data": "s3://bucket/val"}, "finetune.validation_ratio"),
        ({"finetune.validation_labels": "s3://bucket/val.txt"}, "finetune.validation_labels"),
        ({"finetune.kind": "linear", "zero_stage": 3}, "zero_stage"),
        ({"finetune.kind": "linear", "precision": "bf16_pure"}, "precision"),
        ({"finetune.min_learning_rate": 1}, "finetune.min_learning_rate"),
        ({"finetune.layer_decay": 1.5}, "finetune.layer_decay"),
        ({"finetune.layerdecay": 0.5}, "finetune.layerdecay"),
        ({"finetune": 1}, "finetune"),
    ],
)
def test_a_finetuning_that_cannot_be_trained_is_refused(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        FINETUNE.amended(overrides)

    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "grain"),
    [
        ({"grain_size": 1}, 2),
        ({"micro_batch_size": 1}, 2),
        ({"micro_batch_size": 1, "global_batch_size": 72, "lanes": 24}, 3),  # a lane's share, since no 2 divides it
        ({"micro_batch_size": 2, "global_batch_size": 72, "lanes": 24}, 3),
        ({"micro_batch_size": 1, "global_batch_size": 64, "lanes": 64}, 2),  # of two lanes
    ],
)
def test_images_that_would_be_mixed_with_themselves_are_refused_with_a_grain_that_does(
    changes: dict[str, Any], grain: int
) -> None:
    given = {"finetune.mixup": 0.8, "max_workers": 1, "min_workers": 1, **changes}

    with pytest.raises(RecipeError, match=rf"at least 2 images.*got 1; set grain_size={grain}, or"):
        FINETUNE.amended(given)
    assert FINETUNE.amended({**given, "grain_size": grain}).mixed_images == grain
    with pytest.raises(RecipeError, match=r"share of the batch of at least 2 images.*lower lanes"):
        FINETUNE.amended({"finetune.cutmix": 1.0, "global_batch_size": 8, "lanes": 8, "reproducible": "rounding"})


def test_fields_of_a_finetuning_are_refused_in_a_pretraining() -> None:
    error = refused({"finetune.mixup": 0.1})

    assert error.field == "finetune.mixup"
    assert "tiny_finetune" in error.remedy


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ConvMAEConfig)])
def test_every_field_of_the_model_is_part_of_the_trajectory(field: str) -> None:
    assert field in TINY.amended({"model.views": 4, "model.in_channels": 1}).trajectory()["model"]


def test_one_view_is_what_it_was_before_there_were_several() -> None:
    fields = TINY.to_json()
    assert fields["model"].pop("views") == 1

    older = Recipe.from_json(fields)

    assert older == TINY
    assert "views" not in TINY.trajectory()["model"]
    assert difference(TINY.trajectory(), TINY.amended({"model.views": 4}).trajectory()) == ["model.views: None -> 4"]


def test_rgb_is_what_it_was_before_there_was_gray() -> None:
    fields = TINY.to_json()
    assert fields["model"].pop("in_channels") == 3

    assert Recipe.from_json(fields) == TINY
    assert "in_channels" not in TINY.trajectory()["model"]


def test_one_size_of_images_is_what_it_was_before_there_were_several() -> None:
    fields = TINY.to_json()
    assert fields.pop("resolution_schedule") == []

    assert Recipe.from_json(fields) == TINY
    assert "resolution_schedule" not in TINY.trajectory()


def test_two_spellings_of_a_ratio_that_views_make_are_one_recipe() -> None:
    changes = {"model.views": 3, "model.image_size": 96}

    rounded, exact = (TINY.amended({**changes, "model.mask_ratio": ratio}) for ratio in (0.667, 2 / 3))

    assert rounded == exact and rounded.digest() == exact.digest()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_json(name: str) -> None:
    recipe = named_recipe(name)

    copy = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))

    assert copy == recipe
    assert copy.digest() == recipe.digest()


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        TINY.epochs = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.model.mask_ratio = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "field", "rule", "value", "remedy"),
    [
        ({"lanes": 7}, "lanes", "must divide global_batch_size = 64", 7, "lanes=8"),
        ({"lanes": 60}, "lanes", "must divide global_batch_size = 64", 60, "lanes=64"),
        ({"lanes": 1000}, "lanes", "must divide global_batch_size = 64", 1000, "lanes=64"),
        ({"max_workers": 9}, "max_workers", "at most lanes = 8", 9, "raise lanes (a divisor of 64)"),
        ({"min_workers": 3}, "min_workers", "at most max_workers = 2", 3, "max_workers=3"),
        ({"warmup_epochs": 40}, "warmup_epochs", "below epochs = 40", 40.0, "warmup_epochs=4,"),
        ({"checkpoint_min_seconds": 3601}, "checkpoint_min_seconds", "max_seconds = 3600", 3601.0, "max_seconds=3601"),
        ({"checkpoint_interval": "never"}, "checkpoint_interval", "'steps', 'seconds' or 'auto'", "never", "<steps|"),
        ({"checkpoint_every_seconds": 0}, "checkpoint_every_seconds", "greater than 0", 0, "=<float>"),
        ({"model.mask_ratio": 0.0}, "model.mask_ratio", "must hide at least one of 64 patches", 0.0, "0.75"),
        ({"compile": True, "zero_stage": 3}, "compile", "false with zero_stage = 3", True, "zero_stage=2"),
        ({"recompute": ["stage4"]}, "recompute", "'stage1', 'stage2', 'stage3' or 'decoder'", "stage4", "recompute="),
        ({"epochs": 0}, "epochs", "greater than 0", 0, "epochs=<int>"),
        ({"seed": -1}, "seed", "greater than or equal to 0", -1, "seed=<int>"),
        ({"metrics_port": 65536}, "metrics_port", "less than or equal to 65535", 65536, "metrics_port=<int>"),
        (
            {"tracker": ["mlflow", "mlflow"]},
            "tracker",
            "must name each tracker once",
            ["mlflow", "mlflow"],
            'write ["mlflow"]',
        ),
        ({"base_learning_rate": float("inf")}, "base_learning_rate", "finite", float("inf"), "<float>"),
        ({"epochs": "many"}, "epochs", "valid integer", "many", "epochs=<int>"),
        ({"epochs": 4.0}, "epochs", "valid integer", 4.0, "epochs=<int>"),
        ({"epochs": True}, "epochs", "valid integer", True, "epochs=<int>"),
        ({"name": 3}, "name", "valid string", 3, "name=<str>"),
        ({"device": "tpu"}, "device", "'cpu' or 'cuda'", "tpu", "device=<cpu|cuda>"),
        ({"zero_stage": 4}, "zero_stage", "1, 2 or 3", 4, "zero_stage=<1|2|3>"),
        ({"milestone_epochs": ["ten"]}, "milestone_epochs", "valid integer", "ten", "<[int, ...]>"),
        ({"model": "base"}, "model", "field by field", "base", "model.preset=base"),
        ({"model.mask_ratio": 1.5}, "model.mask_ratio", "must be in [0, 1)", 1.5, "0.75"),
        ({"model.views": 2}, "model.views", "mask_ratio = 0.75 be 1 - 1 / views", 2, "mask_ratio=0.5 or views=4"),
        ({"model.views": 4, "model.image_size": 80}, "model.views", "divide the 25 patches", 4, "views=1, or another"),
        ({"model.preset": "bas"}, "model.preset", "must be one of", "bas", "did you mean 'base'?"),
        ({"epoch": 3}, "epoch", "is not a field", "epoch", "did you mean epochs?"),
        ({"model.maskratio": 0.5}, "model.maskratio", "is not a field", "model.maskratio", "model.mask_ratio?"),
        ({"xyz": 1}, "xyz", "is not a field", "xyz", "known: name, data,"),
        ({"data": "s4://b/d"}, "data", "must have a known protocol", "s4://b/d", "s3://"),
        ({"data": "s3://AKIA:hush@b/d"}, "data", "must hold no credentials", "s3://...@b/d", "AWS_SECRET_ACCESS_KEY"),
        ({"run_root": "https://hush@h/r"}, "run_root", "must hold no credentials", "https://...@h/r", "role"),
        ({"init_from": "https://h/w?X-Amz-Signature=hush"}, "init_from", "have no query", "https://h/w?...", "copy"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_says_what_to_do(
    overrides: dict[str, Any], field: str, rule: str, value: object, remedy: str
) -> None:
    error = refused(overrides)

    assert (error.field, error.value) == (field, value)
    assert rule in error.rule
    assert remedy in error.remedy
    assert len(str(error).splitlines()) == 1
    assert all(part in str(error) for part in (field, rule, repr(value), remedy))


@pytest.mark.parametrize(
    "overrides",
    [
        {"lanes": 64},  # one image a lane
        {"max_workers": 8},  # as many workers as lanes
        {"min_workers": 2},
        {"warmup_epochs": 39.9},
        {"checkpoint_min_seconds": 3600.0},
        {"warmup_epochs": 0},
        {"metrics_port": 65535},
    ],
)
def test_a_value_on_the_boundary_is_taken(overrides: dict[str, Any]) -> None:
    recipe = TINY.amended(overrides)

    assert {key: getattr(recipe, key) for key in overrides} == overrides


def test_the_nearest_lanes_are_found_at_once_for_a_huge_batch() -> None:
    error = refused({"global_batch_size": 2**29, "lanes": 1000})

    assert "lanes=1024" in error.remedy


def test_an_integer_is_a_valid_float_and_the_same_recipe() -> None:
    whole, point = TINY.amended({"warmup_epochs": 2}), TINY.amended({"warmup_epochs": 2.0})

    assert isinstance(whole.warmup_epochs, float)
    assert whole.digest() == point.digest()


def test_a_missing_field_is_named() -> None:
    fields = TINY.to_json()
    del fields["epochs"]

    with pytest.raises(RecipeError, match=r"^epochs: .*required.*epochs=<int>") as caught:
        Recipe.from_json(fields)
    assert len(str(caught.value)) < 200


def test_batch_arithmetic_follows_the_paper() -> None:
    recipe = named_recipe("convmae_base")

    assert recipe.learning_rate == pytest.approx(1.5e-4 * 4096 / 256)
    assert recipe.lane_batch_size * recipe.lanes == recipe.global_batch_size


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("epochs=400", 400),
        ("base_learning_rate=1.5e-4", 1.5e-4),
        ("model.norm_pix=true", True),
        ("model.embed_dim=[48, 96, 192]", [48, 96, 192]),
        ("device=cpu", "cpu"),
        ("name='quoted'", "quoted"),
        ("data=s3://bucket/a-b_c", "s3://bucket/a-b_c"),
        ("data=s3://bucket/key=value", "s3://bucket/key=value"),
        ("data==", "="),
        ("data=", ""),
    ],
)
def test_arguments_are_read_as_toml_and_bare_words_as_strings(argument: str, value: object) -> None:
    overrides = parse_overrides([argument])

    assert overrides == {argument.partition("=")[0]: value}
    assert type(next(iter(overrides.values()))) is type(value)


@pytest.mark.parametrize("argument", ["epochs", "=4", ""])
def test_an_argument_that_is_not_an_assignment_is_refused(argument: str) -> None:
    with pytest.raises(RecipeError, match="must be field=value"):
        parse_overrides([argument])


def test_a_field_that_is_given_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="epochs: must be given once"):
        parse_overrides(["epochs=3", "seed=1", "epochs=4"])


def test_a_field_of_the_model_is_amended_alone() -> None:
    recipe = TINY.amended(parse_overrides(["model.embed_dim=[24, 48, 96]", "model.mask_ratio=0.5"]))

    assert recipe.model == dataclasses.replace(TINY.model, embed_dim=(24, 48, 96), mask_ratio=0.5)
    assert recipe.to_json() | {"model": None} == TINY.to_json() | {"model": None}


def test_a_preset_replaces_the_model_and_other_keys_amend_it() -> None:
    recipe = TINY.amended(parse_overrides(["model.preset=base", "model.loss=l1"]))

    assert recipe.model == ConvMAEConfig.preset("base", loss="l1")


def test_differences_are_listed_leaf_by_leaf() -> None:
    changed = TINY.amended({"epochs": 41, "model.mask_ratio": 0.5})

    assert difference(TINY.to_json(), changed.to_json()) == ["epochs: 40 -> 41", "model.mask_ratio: 0.75 -> 0.5"]
    assert difference(TINY.to_json(), TINY.to_json()) == []


@pytest.mark.parametrize("field", ["data", "run_root", "init_from"])
@pytest.mark.parametrize("written", ["s3://b/x/", "s3a://b/x", "S3N://b//x//", "s3://b/x"])
def test_two_ways_to_write_a_place_are_one_recipe(field: str, written: str) -> None:
    assert named_recipe("tiny").amended({field: written}) == named_recipe("tiny").amended({field: "s3://b/x"})


def test_paths_are_absolute_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    recipe = named_recipe("tiny").amended({"data": "ds/", "run_root": "file:///r/", "cache_dir": "~/cache/"})

    assert (recipe.data, recipe.run_root, recipe.cache_dir) == (f"{tmp_path}/ds", "/r", "/home/me/cache")
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("field", "written", "says"),
    [
        ("cache_dir", "s3://b/cache", "cache_dir: must be a folder on each node's own disk"),
        ("data", "s3:///x", "data: must name a bucket"),
        ("run_root", "s3://b/../x", "run_root: must have no . or .. in it"),
        ("init_from", "s4://b/x", "init_from: must have a known protocol"),
    ],
)
def test_a_place_that_cannot_be_is_refused_by_its_field(field: str, written: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        named_recipe("tiny").amended({field: written})


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[(word, True) for word in ("true", "True", "TRUE", "yes", "on", "1", '"true"')],
        *[(word, False) for word in ("false", "False", "FALSE", "no", "Off", "0")],
    ],
)
@pytest.mark.parametrize("field", ["standby", "compile", "check_etags", "model.fusion", "model.norm_pix"])
def test_what_is_on_or_off_is_taken_as_people_write_it(field: str, written: str, value: bool) -> None:
    recipe = named_recipe("tiny").amended(parse_overrides([f"{field}={written}"]))
    exact = named_recipe("tiny").amended({field: value})

    assert recipe == exact and recipe.digest() == exact.digest()


@pytest.mark.parametrize("field", ["standby", "model.norm_pix"])
@pytest.mark.parametrize("written", ["maybe", "2", "", "[]", "1.5"])
def test_what_is_neither_on_nor_off_is_refused(field: str, written: str) -> None:
    with pytest.raises(RecipeError, match=rf"{field}: .*boolean"):
        named_recipe("tiny").amended(parse_overrides([f"{field}={written}"]))


@pytest.mark.parametrize(
    "text", ["https://hooks.slack.com/services/T0/B0/s3cr3t", "env:HOME", "env:CONVMAE_NOTIFY_", "CONVMAE_NOTIFY_URL"]
)
def test_a_webhook_is_named_by_a_variable_and_never_quoted(text: str) -> None:
    error = refused({"notify_url": text})

    assert error.field == "notify_url" and "notify_url=env:CONVMAE_NOTIFY_URL" in error.remedy
    assert text not in str(error).replace("env:CONVMAE_NOTIFY_URL", "") or text == "CONVMAE_NOTIFY_URL"


@pytest.mark.parametrize("value", ["often", -1])
def test_where_a_number_or_a_word_may_stand_both_are_named(value: object) -> None:
    error = refused({"memory_checkpoint_every_steps": value})

    assert "or should be 'auto'" in error.rule
    assert error.remedy == "give memory_checkpoint_every_steps=<int|auto>"
