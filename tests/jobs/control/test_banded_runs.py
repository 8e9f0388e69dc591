"""Data sets of 16-bit and of multi-band TIFFs: made, read, measured, trained on, and recorded in what comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from PIL import Image
from pipeline_tars import tar_bytes
from safetensors.torch import load_file, save_file

from jobs.cluster.session import Session
from jobs.control.run_plan import plan_run
from jobs.errors import RecipeError
from jobs.evaluate.pictures import reconstructed
from jobs.rank.rank_loader import rank_loader
from jobs.recipe.image_statistics import statistics_metadata
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import order_of
from jobs.report.reconstruction import Stage, reconstruction_grid
from jobs.step.objective import Reconstruction
from jobs.step.training_step import RankPlace
from jobs.weights.consolidated import of_file
from jobs.weights.initial import import_weights
from jobs.weights.weight_files import model_json
from model import ConvMAE
from pipeline.errors import DatasetError
from pipeline.image.augment import center_crop
from pipeline.image.channels import PixelKind
from pipeline.image.photo import Encoding
from pipeline.ingest.index_tar import IndexTask, index_tar
from pipeline.ingest.plan import Ingest, Sharding, plan_shards
from pipeline.ingest.source import Sources, Tars
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load.center_crops import center_crops
from pipeline.load.dataset import Dataset
from pipeline.load.pixel_sums import PixelTask, shard_sums
from pipeline.shard.manifest import Manifest
from pipeline.shard.verify import verify_shard
from pipeline.store.storage import Storage

STORAGE = Storage()
KINDS = [PixelKind(1, 16), PixelKind(3, 16), PixelKind(4, 8), PixelKind(5, 16)]
IDS = ["16-bit gray", "16-bit RGB", "four bands", "five 16-bit bands"]


def image(kind: PixelKind, number: int) -> npt.NDArray[np.uint8 | np.uint16]:
    """(H, W, C); of 16 bits in the lower sixteenth of the range, as those of a 12-bit sensor."""
    random = np.random.default_rng(number)
    most, dtype = (256, np.uint8) if kind.bits == 8 else (4096, np.uint16)
    return random.integers(0, most, (48, 48 + number % 5, kind.channels), dtype)


def save(kind: PixelKind, number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = image(kind, number)
    if kind.channels == 1:
        tifffile.imwrite(path, values[..., 0], photometric="minisblack", compression="zlib")
    else:
        tifffile.imwrite(
            path, values, photometric="minisblack", planarconfig="contig", tile=(16, 16), compression="zlib"
        )


def banded_dataset(folder: Path, kind: PixelKind, *, others: bool = False) -> Dataset:
    for number in range(16):
        save(kind, number, folder / "images" / f"{number:02d}.tif")
    if others:
        save(PixelKind(2, 16), 0, folder / "images" / "two.tif")
        Image.new("RGB", (40, 40)).save(folder / "images" / "photo.jpg")
    url = str(folder / "data")
    sources = find_sources(STORAGE, str(folder / "images"))
    assert isinstance(sources, Sources)
    job = Ingest(sources, Sharding(20, encoding=Encoding(bands=kind)))
    (task,) = plan_shards(sources, job.sharding)
    report = write_shard(STORAGE, url, task)
    assert write_shard(STORAGE, url, task) == replace(report, kept=True)
    pixels = shard_sums(STORAGE, url, PixelTask(report.entry, tuple(range(report.samples)), job.pixels)).statistics()
    Manifest.of([job], [report], sources.classes).measured(pixels).save(STORAGE, url, report.skipped)
    return Dataset.open(STORAGE, url)


@pytest.fixture(params=KINDS, ids=IDS)
def kind(request: pytest.FixtureRequest) -> PixelKind:
    found: PixelKind = request.param
    return found


@pytest.fixture
def dataset(kind: PixelKind, tmp_path: Path) -> Dataset:
    return banded_dataset(tmp_path / "set", kind)


def planned(dataset: Dataset, tmp_path: Path, **changes: object) -> Recipe:
    session = Session({"RAY_ADDRESS": "http://10.0.0.1:8265"}, tmp_path, None, STORAGE)
    fields = {"data": dataset.url, "run_root": str(tmp_path / "runs"), "model.image_size": 32, "probes": False}
    few = {"global_batch_size": 8, "lanes": 8, "micro_batch_size": 4, "loader_threads": 1}
    wanted = named_recipe("tiny").amended({**fields, **few, **changes})
    return plan_run(session, wanted, "first", drives=False).recipe


def test_the_manifest_says_what_images_are_and_what_numpy_measures(dataset: Dataset, kind: PixelKind) -> None:
    found = dataset.manifest.pixels
    images = [image(kind, number) / (2**kind.bits - 1) for number in range(16)]

    assert found and dataset.manifest.kind == found.kind == kind and dataset.manifest.format_version == 4
    mean = np.mean([each.mean((0, 1)) for each in images], 0)
    square = np.mean([(each**2).mean((0, 1)) for each in images], 0)
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(square - mean**2), atol=1e-6)


def test_a_shard_is_verified_to_its_values(dataset: Dataset, kind: PixelKind) -> None:
    entry = dataset.manifest.shards[0]

    assert verify_shard(STORAGE, dataset.url, entry, deep=True, pixels=kind).faults == ()
    other = verify_shard(STORAGE, dataset.url, entry, deep=True, pixels=PixelKind(7, 16)).faults
    assert len(other) == 16 and "but in this data set 7 x 16" in other[0].what


def test_evaluation_sees_the_values(dataset: Dataset, kind: PixelKind) -> None:
    (found,) = center_crops(dataset, [np.arange(16)], (48, 48), threads=2, channels=kind.channels)

    expected = [center_crop(image(kind, number), (48, 48)) for number in range(16)]
    assert sorted(each.tobytes() for each in found) == sorted(each.tobytes() for each in expected)


def test_a_model_of_other_channels_is_refused(dataset: Dataset, kind: PixelKind, tmp_path: Path) -> None:
    rule = f"must have images of 7 channels, as the model takes them, got '{kind.channels} in"
    with pytest.raises(DatasetError, match=rule):
        list(center_crops(dataset, [np.arange(4)], (48, 48), threads=1, channels=7))
    rule = rf"model.in_channels: must be the data set's {kind.channels}, got 7; .*--bands"
    with pytest.raises(RecipeError, match=rule):
        planned(dataset, tmp_path, **{"model.in_channels": 7})


def test_a_run_trains_on_them_and_what_comes_of_it_says_so(dataset: Dataset, kind: PixelKind, tmp_path: Path) -> None:
    """Three steps of the forward and backward pass on what the loader of a rank gives; then a picture."""
    given = planned(dataset, tmp_path)
    assert (given.model.in_channels, given.image_bits) == (kind.channels, kind.bits)
    assert dataset.manifest.pixels and given.statistics == (dataset.manifest.pixels.mean, dataset.manifest.pixels.std)
    torch.manual_seed(0)
    model, objective = ConvMAE(given.model), Reconstruction(given, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = rank_loader(dataset, order_of(given, dataset.samples), given, RankPlace(0, 1, torch.device("cpu")))

    losses = []
    for batch in loader.batches(0, 3):
        assert batch.images.shape == (8, kind.channels, 32, 32)
        assert batch.images.dtype == (torch.uint8 if kind.bits == 8 else torch.uint16)
        loss = objective.output(model, batch, slice(0, 8)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert np.isfinite(losses).all() and losses[2] < losses[0]
    metadata = statistics_metadata(*given.statistics, given.image_bits)
    assert json.loads(metadata["image_mean"]) == list(given.image_mean)
    assert metadata.get("image_bits") == ("16" if kind.bits == 16 else None)
    stages = [Stage("trained", model.state_dict())]
    picture = np.asarray(reconstruction_grid(given.model, given.statistics, stages, dataset, seed=0, count=4))
    assert picture[34:200, 8:200].std() > 30, "values are shown with contrast, though they fill a part of the range"


def test_processes_make_of_them_what_threads_make_at_each_size(
    dataset: Dataset, kind: PixelKind, tmp_path: Path
) -> None:
    growing = {"epochs": 2, "warmup_epochs": 0, "model.image_size": 48, "resolution_schedule": [[0, 32], [0.5, 48]]}
    recipe = planned(dataset, tmp_path, **growing)
    order, place = order_of(recipe, dataset.samples), RankPlace(0, 1, torch.device("cpu"))
    threads, processes = (
        list(rank_loader(dataset, order, recipe.amended({"loader_processes": given}), place).batches(0, 4))
        for given in (False, True)
    )

    dtype = torch.uint8 if kind.bits == 8 else torch.uint16
    assert [(batch.images.shape[2], batch.images.dtype) for batch in threads] == [(32, dtype)] * 2 + [(48, dtype)] * 2
    for one, other in zip(threads, processes, strict=True):
        assert torch.equal(one.images, other.images) and np.array_equal(one.crops, other.crops)


def test_own_pictures_are_reconstructed_with_their_bits(dataset: Dataset, tmp_path: Path) -> None:
    given = planned(dataset, tmp_path)
    urls = [str(tmp_path / "set" / "images" / f"{number:02d}.tif") for number in range(3)]

    picture = np.asarray(reconstructed(STORAGE, urls, ConvMAE(given.model).eval(), given.statistics, seed=0))

    assert picture[34:200, 8:200].std() > 30


def test_images_of_other_bands_or_bits_are_skipped_with_the_reason(tmp_path: Path) -> None:
    dataset = banded_dataset(tmp_path, PixelKind(4, 8), others=True)

    lines = [json.loads(line) for line in Path(dataset.url, "skipped.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["reason"] for line in lines}
    assert dataset.samples == 16 and set(reasons) == {"two.tif", "photo.jpg"}
    assert "2 x 16 bits, but in this data set 4 x 8" in reasons["two.tif"]
    assert "no TIFF or PNG" in reasons["photo.jpg"]


@pytest.mark.parametrize("deep", [False, True])
def test_tars_made_elsewhere_are_indexed_as_they_are(tmp_path: Path, deep: bool) -> None:
    members = []
    for number in range(4):
        save(PixelKind(4 if number < 3 else 1, 16), number, tmp_path / "one.tif")
        members.append((f"{number}.tif", (tmp_path / "one.tif").read_bytes()))
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar_bytes(members))
    found = find_sources(STORAGE, str(folder))
    assert isinstance(found, Tars)
    task = IndexTask(found.root, found.tars[0], deep, False, PixelKind(4, 16))

    report = index_tar(STORAGE, str(folder), task)

    assert report.samples == 3 and report.report
    assert "1 x 16 bits, but in this data set 4 x 16" in report.report.skipped[0].reason
    assert task.digest != replace(task, pixels=PixelKind(5, 16)).digest


def test_rgb_weights_are_taken_by_the_rule_and_the_data_sets_statistics_count(tmp_path: Path) -> None:
    dataset = banded_dataset(tmp_path / "set", PixelKind(4, 8))
    plan = planned(dataset, tmp_path)
    torch.manual_seed(0)
    colour = replace(plan.model, in_channels=3)
    source, out = tmp_path / "rgb.safetensors", tmp_path / "four.safetensors"
    save_file(ConvMAE(colour).state_dict(), source, metadata={"format": "pt", "model": model_json(colour)})

    import_weights(STORAGE, str(source), str(out), plan.model)

    given, made = load_file(source), load_file(out)
    name = "encoder.patch_embed1.proj.weight"
    torch.testing.assert_close(made[name], (given[name].sum(1, keepdim=True) / 4).repeat(1, 4, 1, 1))
    begun = planned(dataset, tmp_path, init_from=str(out))
    assert dataset.manifest.pixels and begun.statistics == (dataset.manifest.pixels.mean, dataset.manifest.pixels.std)


@pytest.mark.parametrize("kind", [PixelKind(3, 16), PixelKind(5, 16)], ids=["16-bit RGB", "five 16-bit bands"])
def test_weights_that_are_imported_again_say_of_what_images_they_are(tmp_path: Path, kind: PixelKind) -> None:
    plan = planned(banded_dataset(tmp_path / "set", kind), tmp_path)
    source, out = tmp_path / "ours.safetensors", tmp_path / "again.safetensors"
    metadata = {"format": "pt", "model": model_json(plan.model)}
    metadata |= statistics_metadata(*plan.statistics, plan.image_bits)
    save_file(ConvMAE(plan.model).state_dict(), source, metadata=metadata)

    import_weights(STORAGE, str(source), str(out), plan.model)

    again = of_file(STORAGE, str(out))
    assert again.image_bits == 16 and again.statistics == plan.statistics
