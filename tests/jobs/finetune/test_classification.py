"""Fine-tuning's steps at several world sizes, by real engines on gloo; the slow ones take 10 s each."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from zero_groups import WorkerGroup
from zero_material import commit_parts

from jobs.finetune.classification import Classification
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.step.engine import LEARNING_RATE_SCALE, build_model, optimizer_groups
from model import Classifier
from pipeline.load.bad_sample import BadSample
from pipeline.load.batch import Batch
from pipeline.load.image_maker import Substitution
from pipeline.store.storage import Storage

CLASSES = ["a", "b", "c", "d", "e", "f", "g"]
SMALL = {"model.image_size": 32, "model.depth": [1, 1, 2], "global_batch_size": 24, "lanes": 12, "max_workers": 12}


def recipe(name: str = "tiny_finetune", **changes: object) -> Recipe:
    """Twelve grains of two images, mixed, with dropped paths."""
    given: dict[str, object] = {"finetune.classes": CLASSES, "finetune.min_learning_rate": 0.0}
    if name == "tiny_finetune":
        given |= {"finetune.mixup": 0.8, "finetune.cutmix": 1.0, "finetune.drop_path": 0.5, "finetune.erasing": 0.5}
    return named_recipe(name).amended({**SMALL, **given, **changes})


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], WorkerGroup]]:
    folder, made = tmp_path_factory.mktemp("classification"), []

    @functools.cache
    def group(world_size: int) -> WorkerGroup:
        made.append(WorkerGroup(world_size, folder))
        return made[-1]

    for world_size in (1, 2):  # side by side
        group(world_size)
    yield group
    for each in made:
        each.close()
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "world_sizes"),
    [
        ("tiny_finetune", (2,)),
        pytest.param("tiny_finetune", (2, 3), marks=pytest.mark.slow),
        pytest.param("tiny_linear", (2, 3), marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_have_the_same_bits_at_every_world_size_and_after_resuming_at_another(
    groups: Callable[[int], WorkerGroup], name: str, world_sizes: tuple[int, ...], tmp_path: Path
) -> None:
    alone, folder = groups(1), tmp_path / "files"
    losses = alone.train(recipe(name), ["train", "train", str(folder), "train", "train"])
    digests = alone.digests

    assert len(set(digests)) == 4
    for world_size in world_sizes:
        assert groups(world_size).train(recipe(name), ["train"] * 4) == losses
        assert groups(world_size).digests == digests

    run = RunDirectory(Storage(), str(tmp_path / "run"))
    commit_parts(run, recipe(name), folder, step=2, stage=1, world_size=1)
    assert groups(2).train(recipe(name), ["train", "train"], resume=run) == losses[2:]
    assert groups(2).digests == digests[2:]


@pytest.mark.slow
def test_zero_3_trains_the_same_within_rounding(groups: Callable[[int], WorkerGroup]) -> None:
    # A lane's two images are mixed with each other, as the grain's are that is as large.
    exact = groups(1).train(recipe(), ["train"] * 3)
    changes = {"zero_stage": 3, "micro_batch_size": 5}

    assert groups(2).train(recipe(**changes), ["train"] * 3) == pytest.approx(exact, rel=1e-3)


def test_each_layer_has_its_learning_rate_in_the_optimizer() -> None:
    model = build_model(recipe(**{"finetune.layer_decay": 0.5}))
    names = {id(value): name for name, value in model.named_parameters()}

    found = {
        names[id(value)]: (group[LEARNING_RATE_SCALE], group["weight_decay"])
        for group in optimizer_groups(model, recipe(**{"finetune.layer_decay": 0.5}))
        for value in group["params"]
    }

    # Layer 0, two blocks of stage 3, then the head.
    assert found["head.weight"] == (1.0, 0.05)
    assert found["fc_norm.bias"] == (1.0, 0.0)
    assert found["encoder.blocks3.1.mlp.fc1.weight"] == (0.5, 0.05)
    assert found["encoder.blocks3.0.mlp.fc1.weight"] == (0.25, 0.05)
    assert found["encoder.blocks1.0.conv1.weight"] == (0.125, 0.05)
    assert set(found) == {name for name, value in model.named_parameters() if value.requires_grad}


def one_batch(recipe: Recipe, substitutions: tuple[Substitution, ...] = ()) -> Batch:
    shape = (recipe.global_batch_size, 3, *recipe.model.image_shape)
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    crops = np.zeros((len(images), 5), np.int32)
    return Batch(0, 3, torch.arange(len(images)), images, 0.0, crops, substitutions)


def test_a_substitute_has_its_own_label() -> None:
    # Of a head whose every logit is zero but one, the loss says how many labels are of that class.
    given = recipe("tiny_linear", **{"finetune.optimizer": "adamw", "finetune.kind": "full"})
    model = build_model(given)
    assert isinstance(model, Classifier) and isinstance(model.head, torch.nn.Linear)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias[1] = 1.0
    labels = np.zeros(100, np.int64)
    labels[99] = 1
    bad = BadSample(4, "shard", "member", 0, 1, "url", "checksum", "why")
    objective = Classification(given, labels, model, torch.device("cpu"))
    rest = float(np.log(len(CLASSES) - 1 + np.e))

    with_it = objective.output(model, one_batch(given, (Substitution(bad, 3, 99),)), slice(4, 6)).loss
    without = objective.output(model, one_batch(given), slice(4, 6)).loss

    assert without.item() == pytest.approx(rest)
    assert with_it.item() == pytest.approx(rest - 0.5)


def test_a_linear_heads_statistics_are_the_means_over_grains() -> None:
    given = recipe("tiny_linear")
    model = build_model(given)
    assert isinstance(model, Classifier) and isinstance(model.head, torch.nn.Sequential)
    objective, batch = Classification(given, np.zeros(100, np.int64), model, torch.device("cpu")), one_batch(given)
    words = torch.zeros(objective.words, dtype=torch.float64)
    for start in range(0, 24, 2):
        objective.output(model, batch, slice(start, start + 2))
    objective.write(words)
    objective.update(words.tolist())

    from model.pixels import normalise

    features = model.features(normalise(batch.images, given.statistics)).detach().double().view(12, 2, -1)
    mean, variance = features.mean((0, 1)), features.var(1).mean(0)
    torch.testing.assert_close(model.head[0].running_mean.double(), 0.1 * mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head[0].running_var.double(), 0.9 + 0.1 * variance, rtol=1e-4, atol=1e-5)
