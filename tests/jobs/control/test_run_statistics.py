"""What a run normalises its images by: its recipe's, its own from when it began, its first weights', the data set's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_data import STORAGE, labelled_dataset
from safetensors.torch import save_file

from jobs.cluster.session import Session
from jobs.control.run_plan import plan_run
from jobs.errors import RecipeError, RunError
from jobs.rank.rank_loader import rank_loader
from jobs.recipe.image_statistics import IMAGENET_MEAN, IMAGENET_STD
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import order_of
from jobs.step.objective import Reconstruction
from jobs.step.training_step import RankPlace
from jobs.weights.weight_files import model_json
from model import ConvMAE
from pipeline.load.dataset import Dataset
from pipeline.shard.manifest import Manifest
from pipeline.shard.pixel_statistics import PixelStatistics

MEASURED = PixelStatistics(24, (0.5, 0.25, 0.125), (0.3, 0.2, 0.1))
OTHER = PixelStatistics(24, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


@pytest.fixture
def laptop(tmp_path: Path) -> Session:
    """A session whose cluster is elsewhere."""
    return Session({"RAY_ADDRESS": "http://10.0.0.1:8265"}, tmp_path, None, STORAGE)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A data set that was measured."""
    dataset = labelled_dataset(tmp_path / "set", {"ant": 12, "bee": 12})
    dataset.manifest.measured(MEASURED).save(STORAGE, dataset.url, [])
    return dataset.url


def recipe(data: str, tmp_path: Path, **changes: object) -> Recipe:
    fields = {"data": data, "run_root": str(tmp_path / "runs"), "model.image_size": 32, "probes": False}
    return named_recipe("tiny").amended(
        {**fields, "global_batch_size": 8, "lanes": 8, "micro_batch_size": 4, **changes}
    )


def planned(laptop: Session, wanted: Recipe) -> Recipe:
    return plan_run(laptop, wanted, "first", drives=False).recipe


def test_a_new_run_takes_those_of_its_data_set_into_its_record(laptop: Session, data: str, tmp_path: Path) -> None:
    plan = plan_run(laptop, recipe(data, tmp_path), "first", drives=False)
    plan.run.claim(plan.recipe)

    assert plan.recipe.statistics == (MEASURED.mean, MEASURED.std)
    assert plan.run.read_recipe().statistics == (MEASURED.mean, MEASURED.std)
    assert plan.recipe.digest() != recipe(data, tmp_path).digest()


def test_a_data_set_that_was_never_measured_means_imagenets(laptop: Session, tmp_path: Path) -> None:
    data = labelled_dataset(tmp_path / "set", {"ant": 12, "bee": 12}).url

    begun = planned(laptop, recipe(data, tmp_path))

    assert (begun.image_mean, begun.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert begun.digest() == recipe(data, tmp_path).digest(), "as it was before data sets were measured"


def test_the_recipes_own_take_precedence(laptop: Session, data: str, tmp_path: Path) -> None:
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}

    assert planned(laptop, recipe(data, tmp_path, **own)).statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_run_keeps_what_it_began_with(laptop: Session, data: str, tmp_path: Path) -> None:
    wanted = recipe(data, tmp_path)
    plan = plan_run(laptop, wanted, "first", drives=False)
    plan.run.claim(plan.recipe)
    Manifest.load(STORAGE, data).measured(OTHER).save(STORAGE, data, [])

    assert planned(laptop, wanted) == plan.recipe
    with pytest.raises(RunError, match="image_mean"):
        planned(laptop, recipe(data, tmp_path, image_mean=list(OTHER.mean), image_std=list(OTHER.std)))


def test_a_run_from_before_there_were_others_keeps_imagenets(laptop: Session, data: str, tmp_path: Path) -> None:
    wanted = recipe(data, tmp_path)
    run = plan_run(laptop, wanted, "first", drives=False).run
    run.claim(wanted)
    path = Path(run.url, "recipe.json")
    fields = json.loads(path.read_text())
    del fields["image_mean"], fields["image_std"]
    path.write_text(json.dumps(fields))

    assert planned(laptop, wanted).statistics == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("has_record", [True, False])
def test_a_run_that_starts_from_weights_normalises_as_they_did(
    laptop: Session, data: str, tmp_path: Path, has_record: bool
) -> None:
    config = recipe(data, tmp_path).model
    torch.manual_seed(0)
    metadata = {"format": "pt", "model": model_json(config)}
    if has_record:
        metadata |= {"image_mean": json.dumps(OTHER.mean), "image_std": json.dumps(OTHER.std)}
    path = tmp_path / "start.safetensors"
    save_file(ConvMAE(config).state_dict(), path, metadata=metadata)

    begun = planned(laptop, recipe(data, tmp_path, init_from=str(path)))

    assert begun.statistics == ((OTHER.mean, OTHER.std) if has_record else (IMAGENET_MEAN, IMAGENET_STD))


GRAY = PixelStatistics(24, (0.4,), (0.2,))


@pytest.fixture
def gray(tmp_path: Path) -> str:
    """A data set whose images are read as gray."""
    dataset = labelled_dataset(tmp_path / "gray", {"ant": 12, "bee": 12})
    dataset.manifest.measured(GRAY).save(STORAGE, dataset.url, [])
    return dataset.url


def test_a_run_on_gray_images_has_a_model_for_them(laptop: Session, gray: str, tmp_path: Path) -> None:
    plan = plan_run(laptop, recipe(gray, tmp_path), "first", drives=False)
    plan.run.claim(plan.recipe)

    assert plan.recipe.model.in_channels == 1 and plan.recipe.statistics == (GRAY.mean, GRAY.std)
    assert planned(laptop, recipe(gray, tmp_path)) == plan.recipe, "also when it is resumed"


def test_statistics_of_other_channels_than_the_data_sets_are_refused(
    laptop: Session, gray: str, data: str, tmp_path: Path
) -> None:
    colour = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    with pytest.raises(RecipeError, match=r"image_mean: must have a number for each channel, 1, .*image_mean=\[\]"):
        planned(laptop, recipe(gray, tmp_path, **colour))
    with pytest.raises(RecipeError, match=r"model.in_channels: must be the data set's 3, got 1; .*--gray"):
        planned(laptop, recipe(data, tmp_path, **{"model.in_channels": 1}))


def test_a_gray_run_trains_on_its_data_and_its_weights_say_so(laptop: Session, gray: str, tmp_path: Path) -> None:
    """Two steps of the forward and backward pass on what the loader of a rank gives."""
    given = planned(laptop, recipe(gray, tmp_path, loader_threads=1))
    dataset = Dataset.open(STORAGE, gray)
    torch.manual_seed(0)
    model, objective = ConvMAE(given.model), Reconstruction(given, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = rank_loader(dataset, order_of(given, dataset.samples), given, RankPlace(0, 1, torch.device("cpu")))

    losses = []
    for batch in loader.batches(0, 2):
        assert batch.images.shape == (8, 1, 32, 32)
        loss = objective.output(model, batch, slice(0, 8)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert np.isfinite(losses).all() and losses[0] != losses[1]
