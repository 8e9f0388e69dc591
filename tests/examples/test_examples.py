"""The examples run as a user runs them."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch

from jobs.weights.consolidated import Weights
from jobs.weights.export import Source, export
from model import ConvMAE, ConvMAEConfig
from pipeline.store.storage import Storage

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = ConvMAEConfig(image_size=64, embed_dim=(8, 16, 24), num_heads=2, depth=(1, 1, 1))


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A file of `convmae export --format backbone`."""
    torch.manual_seed(0)
    source = Source.of(Weights(CONFIG, ConvMAE(CONFIG).state_dict(), {}), None)
    return export(source, "backbone", Storage(), str(tmp_path))[0].url


def run(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def works() -> bool:
    """Whether there is a torchvision that was built for this torch."""
    try:
        importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError):
        return False
    return True


def test_a_segmenter_learns_from_the_maps(
    weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    run("segmentation_upernet.py", "--weights", weights, "--steps", "8", "--image-size", "64")

    *steps, last = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    assert last.startswith("pixels classified as they are labelled")


def test_a_detector_trains_where_torchvision_fits_and_says_so_where_not(
    weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    arguments = ("detection_mask_rcnn.py", "--weights", weights, "--steps", "2", "--image-size", "64")
    if works():
        run(*arguments)
        assert "loss_mask" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as ended:
        run(*arguments)

    assert isinstance(ended.value.code, str)
    assert ended.value.code.startswith("this example needs a torchvision that was built for torch")
    assert len(ended.value.code.splitlines()) == 1
