"""A segmenter trained by a process that is killed, and by two that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training
from made_scenes import write_ade
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def started(data: Path, out: Path, steps: int, *launcher: str) -> subprocess.Popen[str]:
    """Of one sample a micro-batch, so that as many are summed at once by any number of processes."""
    command = [sys.executable, *launcher, str(EXAMPLES / "segmentation_upernet.py"), "--data", str(data)]
    command += ["--out", str(out), "--schedule", str(EXAMPLES / "schedules" / "ade_tiny.toml")]
    command += ["--set", f"steps={steps}", "--save-every-steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return output


def weights(out: Path) -> dict[str, Tensor]:
    saved: dict[str, Tensor] = torch.load(out / training.LAST, weights_only=True)["model"]
    return saved


def moments(out: Path) -> Tensor:
    optimizer = torch.load(out / training.LAST, weights_only=True)["optimizer"]
    return torch.cat([state["exp_avg"].flatten() for state in optimizer["state"].values()])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_ade(tmp_path / "ade", "training", 12)
    write_ade(tmp_path / "ade", "validation", 5)
    return tmp_path / "ade"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_that_was_killed_goes_on_to_the_bits_of_one_that_was_not(data: Path, tmp_path: Path) -> None:
    """About half a minute."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(started(data, whole, 20))
    process = started(data, cut, 20)
    until = time.monotonic() + 500
    while not (cut / training.LAST).exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.communicate()

    assert process.returncode == -9
    assert not (cut / "result.json").exists()
    assert "resumed after step " in finished(started(data, cut, 20))
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (cut / "result.json").read_text() == (whole / "result.json").read_text()
    assert (cut / training.LOG).read_text() == (whole / training.LOG).read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_train_and_measure_what_one_does(data: Path, tmp_path: Path) -> None:
    """About half a minute. AdamW's first moments are sums of gradients, which differ by rounding: in another order."""
    finished(started(data, tmp_path / "one", 2))
    finished(started(data, tmp_path / "two", 2, *TORCHRUN))

    one, two = (moments(tmp_path / name) for name in ("one", "two"))
    assert (one - two).norm() < 1e-4 * one.norm()
    measured = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert measured[0]["miou"] == pytest.approx(measured[1]["miou"], abs=1e-3)
    assert measured[0]["pixel_accuracy"] == pytest.approx(measured[1]["pixel_accuracy"], abs=1e-3)
