"""Weights to evaluate, from a seed and from files of the official code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from labelled_data import STORAGE
from safetensors.torch import load_file

from jobs.errors import EvaluationError, WeightsFileError
from jobs.evaluate.encoder import encode
from jobs.evaluate.subject import Subject
from jobs.weights.named_weights import is_file, parted
from model import ConvMAE, ConvMAEConfig

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize(
    "config",
    [
        ConvMAEConfig(image_size=32),
        ConvMAEConfig(image_size=32, embed_dim=(0, 0, 32), depth=(0, 0, 2), fusion=False),
    ],
    ids=["ConvMAE", "MAE"],
)
def test_a_seed_gives_the_weights_with_which_a_run_begins(config: ConvMAEConfig) -> None:
    subject = Subject.of_seed(config, 5, "small")

    torch.manual_seed(5)
    expected = ConvMAE(config).state_dict()
    assert subject.tensors.keys() == expected.keys()
    assert all(torch.equal(subject.tensors[name], value) for name, value in expected.items())
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8).numpy()
    assert encode(subject.encoder(), pixels, "cpu").shape == (2, 32)


@pytest.mark.parametrize("kind", ["whole", "encoder alone", "wrapped"])
def test_official_files_are_read_with_or_without_decoder(tmp_path: Path, kind: str) -> None:
    golden = load_file(GOLDEN / "convmae_tiny_inputs.safetensors")
    official = {name.removeprefix("weight."): value for name, value in golden.items() if name.startswith("weight.")}
    if kind == "encoder alone":
        gone = ("decoder_", "mask_token", "stage1_output", "stage2_output", "norm.")
        official = {name: value for name, value in official.items() if not name.startswith(gone)}
    elif kind == "wrapped":
        official = {f"module.{name}": value for name, value in official.items()}
    torch.save({"model": official, "epoch": 3}, tmp_path / "official.pth")

    subject = Subject.of_file(STORAGE, str(tmp_path / "official.pth"), ConvMAEConfig(), encoder_alone=True)

    model = ConvMAE(ConvMAEConfig())
    model.load_official({name.removeprefix("weight."): v for name, v in golden.items() if name.startswith("weight.")})
    assert subject.encoder().digest == Subject("x", ConvMAEConfig(), model.state_dict(), {}).encoder().digest
    with pytest.raises(WeightsFileError, match="must have a decoder"):
        subject.model()


def test_a_fine_tuned_classifier_is_no_pretraining(tmp_path: Path) -> None:
    state = Subject.of_seed(ConvMAEConfig(), 0, "small").tensors
    tuned = {name.split(".", 1)[1]: value for name, value in state.items() if name.startswith("encoder.")}
    tuned |= {"fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.zeros(32), "head.weight": torch.zeros(9, 32)}
    torch.save({"model": tuned}, tmp_path / "tuned.pth")

    with pytest.raises(WeightsFileError, match="this is a fine-tuned classifier"):
        Subject.of_file(STORAGE, str(tmp_path / "tuned.pth"), ConvMAEConfig())


def test_a_word_is_a_run_and_a_suffix_or_a_place_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"")

    for word in ("a.safetensors", "a.pth", "s3://b/a.pt", str(tmp_path / "weights")):
        assert is_file(STORAGE, word), word
    for word in ("first", "first@5", str(tmp_path), "weights"):
        assert not is_file(STORAGE, word), word


def test_a_step_is_named_once() -> None:
    assert parted("first@400", None) == ("first", 400)
    assert parted("s3://b/runs/first@400", None) == ("s3://b/runs/first", 400)
    assert parted("first", 7) == ("first", 7)
    with pytest.raises(EvaluationError, match="--step: must not be given with RUN@STEP"):
        parted("first@400", 7)
