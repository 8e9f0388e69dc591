"""Commands on what weights are worth, on a machine without stack and cluster."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Typed, assert_refused
from labelled_data import labelled_dataset, picture
from PIL import Image
from safetensors.torch import save_file

from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from model import Backbone, ConvMAE, ConvMAEConfig
from pipeline.store.storage import Storage

RECIPE = """
base = "tiny"
model.image_size = 32
model.embed_dim = [16, 24, 32]
model.depth = [1, 1, 1]
model.num_heads = 2
model.decoder_dim = 32
model.decoder_depth = 1
model.decoder_num_heads = 2
"""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return labelled_dataset(tmp_path_factory.mktemp("data"), {"ant": 20, "bee": 20, "cat": 20}).url


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "small.toml").write_text(RECIPE)
    return str(tmp_path / "small.toml")


@pytest.fixture
def config(recipe: str) -> ConvMAEConfig:
    return named_recipe(recipe).model


@pytest.fixture
def runs(tmp_path: Path, recipe: str, config: ConvMAEConfig) -> str:
    """A run root with one run, of which two steps were consolidated."""
    root = str(tmp_path / "runs")
    run = RunDirectory.of(Storage(), root, "first")
    run.claim(named_recipe(recipe))
    Path(run.path("consolidated")).mkdir()
    for step in (5, 9):
        metadata = {"run": "first", "step": str(step), "epoch": "1", "model": json.dumps(dataclasses.asdict(config))}
        save_file(state(config, step), run.path("consolidated", f"step-0000000{step}.safetensors"), metadata=metadata)
    return root


def state(config: ConvMAEConfig, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(ConvMAE(config).state_dict())


def test_every_kind_of_weights_is_evaluated_and_the_same_ones_give_the_same_figures(
    typed: Typed, labelled: str, runs: str, recipe: str, config: ConvMAEConfig, tmp_path: Path
) -> None:
    torch.save({"model": ConvMAE(config).state_dict()}, tmp_path / "any.pth")
    official = {name.split(".", 1)[1]: value for name, value in state(config, 9).items()}
    encoder_alone = {name: value for name, value in official.items() if "decode" not in name and name != "mask_token"}
    torch.save({"model": encoder_alone}, tmp_path / "released.pth")
    backbone = Backbone(config)
    backbone.load(state(config, 9))
    metadata = {"model": json.dumps(dataclasses.asdict(config))}
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors", metadata=metadata)
    newest = f"{runs}/first/consolidated/step-00000009.safetensors"
    options = ("--data", labelled, "--json", "-")
    place = ("--run-root", runs)

    reports = {}
    for name, words in {
        "the newest": ("first", *place),
        "by step": ("first", "--step", "9", *place),
        "by its own word": ("first@9", *place),
        "another step": (f"{runs}/first@5",),
        "a file": (newest,),
        "official": (str(tmp_path / "released.pth"), "--recipe", recipe),
        "a backbone": (str(tmp_path / "backbone.safetensors"),),
        "random": ("random", "--recipe", recipe, "--seed", "9"),
        "random by a field": ("random", "--recipe", recipe, "seed=9"),
    }.items():
        ended = typed("evaluate", *words, *options)
        assert ended.code == 0, (name, ended.error)
        reports[name] = json.loads(ended.output)

    digests = {name: report["weights"].pop("encoder_sha256") for name, report in reports.items()}
    assert digests.pop("another step") not in digests.values()
    assert len(set(digests.values())) == 1
    results = [json.dumps(report["results"]) for name, report in reports.items() if name != "another step"]
    assert len(set(results)) == 1
    assert reports["the newest"]["weights"] == {
        "name": "first, step 9", "kind": "run", "url": f"{runs}/first", "run": "first", "step": 9, "epoch": 1
    }  # fmt: skip
    assert reports["random"]["weights"]["kind"] == "random"


def test_accuracies_are_printed_and_written(typed: Typed, labelled: str, recipe: str, tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "out" / "it.json"), "--page", str(tmp_path / "out" / "it.html"))

    ended = typed("evaluate", "random", "--recipe", recipe, "--data", labelled, *files, "--k", "5", "--k", "3", "--knn")

    assert (ended.code, ended.error) == (0, "")
    assert "12 test samples of 3 classes, 48 to learn from" in ended.output
    report = json.loads((tmp_path / "out" / "it.json").read_text())
    assert [result["settings"]["k"] for result in report["results"]] == [3, 5]
    for result in report["results"]:
        share = f"{result['top1']['accuracy']:.1%}"
        assert share in ended.output and share in (tmp_path / "out" / "it.html").read_text()
    ended = typed("evaluate", "random", "--recipe", recipe, "--data", labelled, "--linear", "--samples", "30")
    assert "6 test samples of 3 classes, 24 to learn from" in ended.output
    assert "linear probe" in ended.output and "kNN" not in ended.output


def test_features_of_all_samples_are_written(
    typed: Typed, labelled: str, runs: str, recipe: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "features.npz")

    ended = typed("embed", labelled, out, "--weights", "first@5", "--run-root", runs)

    assert (ended.code, ended.error) == (0, "")
    assert "60 samples, 32 features each" in ended.output
    with np.load(out) as found:
        assert found["features"].shape == (60, 32)
        assert json.loads(found["about"].item())["weights"]["step"] == 5
    assert typed("embed", labelled, f"{tmp_path}/f.parquet", "--weights", "random", "--recipe", recipe).code == 0
    refused = typed("embed", labelled, f"{tmp_path}/f.csv", "--weights", "first")
    assert_refused(refused, "OUT: must end in .parquet or .npz")


def test_pictures_are_reconstructed(typed: Typed, runs: str, tmp_path: Path) -> None:
    for number in range(2):
        picture(0, number).save(tmp_path / f"{number}.jpg")
    pictures = [str(tmp_path / f"{number}.jpg") for number in range(2)]
    out = tmp_path / "drawn.png"

    ended = typed("reconstruct", *pictures, "--weights", "first", "--run-root", runs, "--out", str(out))

    assert (ended.code, ended.error) == (0, "")
    assert ended.output == f"{out}: 2 pictures, by first, step 9\n"
    assert Image.open(out).format == "PNG"
    refused = typed("reconstruct", *pictures, "--weights", "first", "--run-root", runs, "--out", f"{tmp_path}/a.gif")
    assert_refused(refused, "--out: must end in .png")


def test_what_cannot_be_evaluated_is_refused_in_one_line(
    typed: Typed, labelled: str, runs: str, recipe: str, config: ConvMAEConfig, tmp_path: Path
) -> None:
    flat = labelled_dataset(tmp_path / "flat", {"ant": 6, "bee": 6}, has_labels=False).url
    one = labelled_dataset(tmp_path / "one", {"ant": 6}).url
    others = labelled_dataset(tmp_path / "others", {"ant": 6, "wolf": 6}).url
    newest = f"{runs}/first/consolidated/step-00000009.safetensors"
    torch.save({"model": state(config, 0)}, tmp_path / "whole.pth")
    encoder = {name: value for name, value in state(config, 0).items() if name.startswith("encoder.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    random = ("random", "--recipe", recipe)
    for words, told in {
        (*random, "--data", flat): ("--data: must have labels", "class folders"),
        (*random, "--data", one): ("--data: must have at least two classes", "ant"),
        (*random, "--data", labelled, "--train-data", others): ("classes: must be the same", "wolf"),
        (*random, "--data", labelled, "--train-data", flat): ("--train-data: must have labels",),
        (*random, "--data", labelled, "--k", "49"): ("--k: must be from 1 to the 48 train samples", "49"),
        (*random, "--data", labelled, "--k", "0"): ("--k", "0"),
        (*random, "--data", labelled, "--linear", "--k", "5"): ("--k: must be given with --knn",),
        (*random, "--data", labelled, "--l2", "0", "--linear"): ("--l2: must be a positive number",),
        (*random, "--data", labelled, "--image-size", "40"): ("--image-size", "multiples of 16", "'40'"),
        (*random, "--data", labelled, "--image-size", "0"): ("--image-size", "'0'"),
        (*random, "--data", labelled, "--image-size", "999999"): ("--image-size", "16384"),
        (*random, "--data", labelled, "--device", "tpu"): ("--device: must be one of auto, cpu, cuda",),
        (*random, "--data", labelled, "--page", "page.pdf"): ("--page: must end in .html",),
        (*random, "--data", labelled, "--head"): ("--head: must be of a fine-tuned classifier",),
        (*random, "--data", labelled, "--finetune-recipe", "tiny"): ("--finetune-recipe: must be given with",),
        (*random, "--data", labelled, "--finetune"): ("--finetune-recipe: must be given for weights of this arch",),
        (*random, "--data", f"{tmp_path}/none"): ("manifest.json",),
        (*random, "--step", "5", "--data", labelled): ("--step: must not be given with random",),
        ("random", "--data", labelled): ("--recipe: must name the model of random weights",),
        ("random", "--recipe", "tiney", "--data", labelled): ("tiny",),
        ("first", "--run-root", runs, "--recipe", recipe, "--data", labelled): ("--recipe: must not be given",),
        ("first", "--run-root", runs, "model.depth=[1,1,2]", "--data", labelled): ("FIELD=VALUE: must not be given",),
        ("first", "--run-root", runs, "--seed", "1", "--data", labelled): ("--seed: must not be given",),
        ("first@5", "--run-root", runs, "--step", "9", "--data", labelled): ("--step", "RUN@STEP"),
        ("first@7", "--run-root", runs, "--data", labelled): ("step", "7"),
        ("frist", "--run-root", runs, "--data", labelled): ("did you mean first?",),
        (newest, "--step", "9", "--data", labelled): ("--step: must not be given",),
        (newest, "model.kernel_size=7", "--data", labelled): ("FIELD=VALUE: must not be given",),
        (newest, "--recipe", recipe, "model.kernel_size=7", "--data", labelled): ("blocks1.0.attn.weight has shape",),
        (f"{tmp_path}/none.safetensors", "--data", labelled): ("weights: must exist",),
        (f"{tmp_path}/whole.pth", "--data", labelled): ("weights: must be those of the model", "has shape"),
    }.items():  # fmt: skip
        assert_refused(typed("evaluate", *words), *told)
    drawn = ("--recipe", recipe, "--out", f"{tmp_path}/a.png")
    refused = typed("reconstruct", f"{flat}/none.jpg", "--weights", f"{tmp_path}/whole.pth", *drawn)
    assert_refused(refused, "PICTURES: must be image files")
    refused = typed("reconstruct", f"{tmp_path}/whole.pth", "--weights", f"{tmp_path}/encoder.pth", *drawn)
    assert_refused(refused, "must have a decoder")
