"""Consolidations of several files, as `convmae export` and `of_run` read them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_s3 import local_s3
from safetensors.torch import load_file, save_file
from torch import Tensor
from zero_material import commit_state, model_material

from jobs.consolidation.consolidate import consolidate
from jobs.consolidation.file_layout import INDEX_NAME
from jobs.consolidation.target import ConsolidatedWeights, Target
from jobs.errors import WeightsFileError
from jobs.export.formats import Source, export
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.weights import consolidated
from jobs.weights.consolidated import Weights
from jobs.weights.weight_files import opened_file
from model import Backbone, ConvMAE, ConvMAEConfig
from pipeline.store.storage import Storage

SMALL = ConvMAEConfig(
    image_size=64, embed_dim=(8, 12, 16), num_heads=2, decoder_dim=16, decoder_num_heads=2, depth=(1, 1, 2)
)
STEP = 4


def commit_small(run: RunDirectory, folder: Path) -> dict[str, Tensor]:
    """A checkpoint of a small model; gives its state dict."""
    torch.manual_seed(0)
    model = ConvMAE(SMALL)
    recipe = named_recipe("tiny").amended({f"model.{name}": v for name, v in dataclasses.asdict(SMALL).items()})
    commit_state(run, recipe, model_material(model), step=STEP, stage=1, world_size=2)
    return dict(model.state_dict())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")


@pytest.fixture
def state(run: RunDirectory, tmp_path: Path) -> dict[str, Tensor]:
    return commit_small(run, tmp_path / "files")


@pytest.fixture
def result(run: RunDirectory, state: dict[str, Tensor]) -> ConsolidatedWeights:
    made = consolidate(run, target=Target(shard_bytes=60_000))
    assert len(made.files) > 2
    return made


def assert_same(weights: Weights, state: dict[str, Tensor]) -> None:
    assert weights.config == SMALL
    assert (weights.metadata["run"], weights.metadata["step"]) == ("first", "4")
    assert weights.tensors.keys() == state.keys()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("place", ["", "/", f"/{INDEX_NAME}"], ids=["folder", "folder with a slash", "index"])
def test_several_files_are_read_as_one(result: ConsolidatedWeights, state: dict[str, Tensor], place: str) -> None:
    assert consolidated.is_weights(Storage(), result.url + place)
    assert_same(consolidated.of_file(Storage(), result.url + place), state)
    assert consolidated.folder_beside(result.url + place) == str(Path(result.url).parent)


def test_a_folder_with_one_file_is_read_too(run: RunDirectory, state: dict[str, Tensor]) -> None:
    result = consolidate(run, target=Target(shard_bytes=10**9))
    assert not Path(result.url, INDEX_NAME).exists()

    assert_same(consolidated.of_file(Storage(), result.url), state)


def test_a_run_is_read_from_several_files_when_its_checkpoint_is_gone(
    run: RunDirectory, result: ConsolidatedWeights, state: dict[str, Tensor], tmp_path: Path
) -> None:
    Path(run.path("commits", f"step-{STEP:08d}.json")).unlink()

    weights = consolidated.of_run(run)

    assert_same(weights, state)
    (written,) = export(Source.of(weights, run), "official", Storage(), str(tmp_path / "out"))
    official = torch.load(written.url, weights_only=True)["model"]
    assert all(torch.equal(official[name.split(".", 1)[1]], tensor) for name, tensor in state.items())

    Path(result.url, INDEX_NAME).unlink()
    with pytest.raises(Exception, match="must have a committed checkpoint"):
        consolidated.of_run(run)  # what is not finished does not count


def test_each_file_is_compared_with_its_sha256(result: ConsolidatedWeights) -> None:
    path = Path(result.files[1].url)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)

    with pytest.raises(WeightsFileError, match=rf"must have the SHA-256 in {path.name}\.sha256.*{path.name}'"):
        consolidated.of_file(Storage(), result.url)


def test_a_file_that_is_missing_is_named(result: ConsolidatedWeights) -> None:
    Path(result.files[2].url).unlink()

    with pytest.raises(WeightsFileError, match=rf"weights: must exist, got '{result.files[2].url}'"):
        consolidated.of_file(Storage(), result.url)


def test_a_tensor_in_another_file_than_the_index_says_is_named(result: ConsolidatedWeights) -> None:
    index = Path(result.url, INDEX_NAME)
    told = json.loads(index.read_text())
    name = next(name for name, file in told["weight_map"].items() if file == Path(result.files[0].url).name)
    told["weight_map"][name] = Path(result.files[1].url).name
    index.write_text(json.dumps(told))

    with pytest.raises(WeightsFileError, match=rf"lists \(unexpected {name}\), got '{result.files[0].url}'"):
        consolidated.of_file(Storage(), result.url)


def test_files_of_two_consolidations_are_not_mixed(result: ConsolidatedWeights) -> None:
    path = Path(result.files[1].url)
    tensors = load_file(path)
    with opened_file(path, str(path)) as file:
        metadata = {**file.metadata(), "step": "8"}
    save_file(tensors, path, metadata=metadata)
    Path(f"{path}.sha256").unlink()

    with pytest.raises(WeightsFileError, match=r"same consolidation as the files before it \(step was '4'\).*step '8'"):
        consolidated.of_file(Storage(), result.url)


def test_several_files_are_made_and_read_on_s3(tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir()
    with local_s3(tmp_path / "s3") as server:
        run = RunDirectory.of(server.storage, f"{server.url}/runs", "first")
        state = commit_small(run, tmp_path / "files")
        result = consolidate(run, target=Target(shard_bytes=60_000))

        assert len(result.files) > 2
        assert_same(consolidated.of_file(server.storage, result.url), state)
        server.storage.delete(run.path("commits", f"step-{STEP:08d}.json"))
        source = Source.of(consolidated.of_run(run), run)
        (written,) = export(source, "backbone", server.storage, f"{server.url}/exports")
        assert server.storage.exists(written.url)

        server.storage.delete(result.files[1].url)
        with pytest.raises(WeightsFileError, match=rf"weights: must exist, got '{result.files[1].url}'"):
            consolidated.of_file(server.storage, result.url)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be the index of several files"),
        ('{"metadata": {}}', "must be the index of several files"),
        ('{"weight_map": {}}', "must name .safetensors files of its own folder"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "must name .safetensors files of its own folder"),
        ('{"weight_map": {"a": 3}}', "must name .safetensors files of its own folder"),
    ],
)
def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)

    with pytest.raises(WeightsFileError, match=message):
        consolidated.of_file(Storage(), str(tmp_path))


def test_a_folder_without_weights_and_an_index_that_is_gone_are_refused(tmp_path: Path) -> None:
    assert not consolidated.is_weights(Storage(), str(tmp_path))
    with pytest.raises(WeightsFileError, match=r"must end in \.safetensors, or be a folder with model\.safetensors"):
        consolidated.of_file(Storage(), str(tmp_path))
    with pytest.raises(WeightsFileError, match="weights: must exist"):
        consolidated.of_file(Storage(), f"{tmp_path}/{INDEX_NAME}")


def test_the_command_exports_a_folder(result: ConsolidatedWeights, state: dict[str, Tensor], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli.main", "export", result.url, "--format", "backbone"]
    environment = {**os.environ, "CONVMAE_HOME": str(tmp_path / "no-stack")}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    written = Path(result.url).parent / f"first-step-{STEP:08d}-backbone.safetensors"
    assert f"backbone: {written} (" in done.stdout, done.stderr
    expected = Backbone(SMALL)
    expected.load(state)
    found = load_file(written)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
