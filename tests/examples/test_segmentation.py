"""UPerNet is trained, interrupted, resumed and tested as a user does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import segmentation_upernet
import torch
import training
from made_scenes import write_ade
from safetensors.torch import save_file
from segmentation_upernet import logits_of_windows
from torch import Tensor, nn

from jobs.export.formats import Source, export
from jobs.weights.consolidated import Weights
from model import ConvMAE, ConvMAEConfig
from pipeline.store.storage import Storage

SCHEDULE = Path(__file__).parents[2] / "examples" / "schedules" / "ade_tiny.toml"
CONFIG = ConvMAEConfig(image_size=64, embed_dim=(8, 16, 24), num_heads=2, depth=(1, 1, 1))


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A file of `convmae export --format backbone`."""
    torch.manual_seed(0)
    source = Source.of(Weights(CONFIG, ConvMAE(CONFIG).state_dict(), {}), None)
    return export(source, "backbone", Storage(), str(tmp_path))[0].url


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_ade(tmp_path / "ade", "training", 12)
    write_ade(tmp_path / "ade", "validation", 4)
    return tmp_path / "ade"


def words(data: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--schedule", str(SCHEDULE), "--micro-batch", "2", *more]


def state(out: Path) -> dict[str, Tensor]:
    saved: dict[str, Tensor] = torch.load(out / training.LAST, weights_only=True)["model"]
    return saved


def test_a_training_that_was_cut_off_has_the_bits_of_one_that_was_not(
    data: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off in its fifth step, after the checkpoint of the fourth; with drop path and dropout, which draw."""
    more = ["--weights", weights, "--save-every-steps", "2", "--set", "steps=6", "--set", "drop_path=0.5"]
    more += ["--set", "dropout=0.5"]
    whole, cut = words(data, tmp_path / "whole", *more), words(data, tmp_path / "cut", *more)
    losses_of = segmentation_upernet.losses_of
    calls = 0

    def cut_off(*given: object) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls > 8:  # two micro-batches a step
            raise KeyboardInterrupt
        return losses_of(*given)  # type: ignore[arg-type]

    assert segmentation_upernet.run(whole) == 0
    monkeypatch.setattr(segmentation_upernet, "losses_of", cut_off)
    with pytest.raises(KeyboardInterrupt):
        segmentation_upernet.run(cut)
    monkeypatch.undo()
    assert segmentation_upernet.run(cut) == 0

    assert "resumed after step 4 of 6" in capsys.readouterr().out
    first, second = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut")]
    assert results[0] == results[1]
    assert results[0]["step"] == 6
    logs = [(tmp_path / name / training.LOG).read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [1, 2, 3, 4, 5, 6]
    assert segmentation_upernet.run([*words(data, tmp_path / "cut", *more), "--set", "learning_rate=1.0"]) == 2
    assert capsys.readouterr().err.startswith("learning_rate: must be 0.001, as in the training in ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_finds_the_shapes(data: Path, tmp_path: Path) -> None:
    """About half a minute."""
    assert segmentation_upernet.run(words(data, tmp_path / "begun", "--set", "steps=1", "--set", "warmup_steps=0")) == 0
    assert segmentation_upernet.run(words(data, tmp_path / "trained")) == 0

    begun, trained = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("begun", "trained"))
    assert begun["miou"] < 0.4
    assert trained["miou"] > 0.8
    assert min(trained["iou"]) > 0.7


def test_the_logits_of_windows_are_their_mean_wherever_windows_lie() -> None:
    class Same(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images

    for height, width in ((64, 96), (50, 70), (30, 64)):
        image = torch.randn(3, height, width)
        assert torch.allclose(logits_of_windows(Same(), image, 32, 21), image, atol=1e-6)


def refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert segmentation_upernet.run(given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_be_trained_is_one_line_and_code_2(
    data: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small, mae = {"image_size": 64}, {"embed_dim": (0, 0, 32), "depth": (0, 0, 2), "fusion": False}
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"model": json.dumps(small)})
    save_file({"a": torch.zeros(1)}, tmp_path / "mae.safetensors", {"model": json.dumps(mae)})
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")

    assert refused(words(tmp_path / "none", out), capsys).startswith("--data: must have this folder, got")
    assert (
        refused(words(data, out, "--set", "classes=2"), capsys)
        .partition(".png: ")[2]
        .startswith("must have values up to 2, or 255 for unlabelled, got 3")
    )
    assert "must be a safetensors file" in refused(words(data, out, "--weights", str(tmp_path / "no")), capsys)
    for name in ("other", "mae"):
        other = refused(words(data, out, "--weights", str(tmp_path / f"{name}.safetensors")), capsys)
        assert other.startswith("--weights: must hold a ConvMAE encoder with convolution stages (")
    bare = refused(words(data, out, "--weights", str(tmp_path / "bare.safetensors")), capsys)
    assert bare.startswith("--weights: must say of which model it is")
    odd = refused(words(data, out, "--set", "batch_size=3"), capsys)
    assert odd.startswith("batch_size: must be a multiple of 1 processes x micro-batches of 2, got 3")
    (tmp_path / "file").touch()
    assert refused(words(data, tmp_path / "file"), capsys).startswith("--out: must be a folder that can be made")
    assert refused(words(data, tmp_path / "empty", "--test-only"), capsys).startswith("--out: must have a last.pt")
