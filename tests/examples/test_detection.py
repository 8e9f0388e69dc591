"""Mask R-CNN is trained, resumed and tested as a user does it, where torchvision is one for the installed torch."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import detection_mask_rcnn
import pytest
import torch
import training
from made_scenes import write_coco

SCHEDULE = Path(__file__).parents[2] / "examples" / "schedules" / "coco_tiny.toml"


def reason_against() -> str:
    """Why torchvision cannot be used here; empty where it can."""
    try:
        importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError) as error:
        return f"no torchvision that was built for torch {torch.__version__}: {str(error).splitlines()[0]}"
    return ""


REASON = reason_against()
needs_torchvision = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco", "train", 24)
    write_coco(tmp_path / "coco", "val", 8)
    return tmp_path / "coco"


def words(data: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", str(data), "--train-split", "train", "--val-split", "val", "--out", str(out)]
    return [*given, "--schedule", str(SCHEDULE), *more]


@pytest.mark.skipif(not REASON, reason="torchvision works here")
def test_a_torchvision_that_does_not_work_is_one_line_and_code_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detection_mask_rcnn.run(words(data, tmp_path / "out")) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"torchvision: must be one that was built for torch {torch.__version__}, got ")
    assert not (tmp_path / "out").exists()


@needs_torchvision
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_was_resumed_has_the_bits_of_one_that_was_not(data: Path, tmp_path: Path) -> None:
    """About ten seconds. Its first half is one that was killed after the checkpoint of the second step."""
    whole, cut = (
        words(data, tmp_path / name, "--set", "steps=4", "--save-every-steps", "2") for name in ("whole", "cut")
    )
    save, kept = training._save, []

    def keep_first(*given: object) -> None:
        if not kept:
            save(*given)  # type: ignore[arg-type]
            kept.append((tmp_path / "whole" / training.LAST).read_bytes())
        save(*given)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_save", keep_first)
        assert detection_mask_rcnn.run(whole) == 0
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / training.LAST).write_bytes(kept[0])
    assert detection_mask_rcnn.run(cut) == 0

    first, second = (torch.load(tmp_path / name / training.LAST, weights_only=True) for name in ("whole", "cut"))
    assert first["step"] == second["step"] == 4
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


@needs_torchvision
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_finds_squares_and_discs(data: Path, tmp_path: Path) -> None:
    """About a minute."""
    assert detection_mask_rcnn.run(words(data, tmp_path / "begun", "--set", "steps=1", "--set", "warmup_steps=0")) == 0
    assert detection_mask_rcnn.run(words(data, tmp_path / "trained")) == 0

    begun, trained = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("begun", "trained"))
    assert begun["box_ap"] < 0.05
    assert trained["box_ap"] > 0.6
    assert trained["mask_ap"] > 0.6


@needs_torchvision
def test_annotations_of_other_classes_are_one_line_and_code_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detection_mask_rcnn.run(words(data, tmp_path / "out", "--set", "classes=5")) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line == "classes: must be that of the annotations, 2, got 5; give --set classes=2"
