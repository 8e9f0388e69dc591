from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs.errors import WeightsFileError
from jobs.recipe.image_statistics import IMAGENET_MEAN, IMAGENET_STD, statistics_metadata
from jobs.weights.file_statistics import IMAGENET, image_statistics, statistics_in
from model import ChannelStatistics, ConvMAEConfig


def test_what_is_written_is_read() -> None:
    mean, std = (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)

    assert image_statistics(statistics_metadata(mean, std), "x") == (mean, std)


def test_weights_that_do_not_say_were_trained_with_imagenets() -> None:
    assert image_statistics({"run": "first"}, "x") == IMAGENET == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
@pytest.mark.parametrize(
    "value", ["", "{}", "0.5", "[0.5]", "[]", '["a","b","c"]', "[0.1,0.2,NaN]", "[1,2,3]", "[true,0.5,0.5]", "["]
)
def test_a_damaged_record_is_refused(key: str, value: str) -> None:
    with pytest.raises(WeightsFileError, match=r"must say what its images were normalised by .*s3://b/x"):
        image_statistics({key: value}, "s3://b/x")


def test_a_deviation_of_nothing_is_refused() -> None:
    with pytest.raises(WeightsFileError):
        image_statistics({"image_std": "[0.1, 0.2, 0]"}, "x")


def test_files_of_every_kind_are_asked(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(1)}
    torch.save({"model": tensors}, tmp_path / "official.pth")
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(tensors, tmp_path / "ours.safetensors", metadata={"image_mean": json.dumps([0.1, 0.2, 0.3])})

    def found(name: str, config: ConvMAEConfig) -> ChannelStatistics:
        return statistics_in(tmp_path / name, name, config)

    rgb, gray = ConvMAEConfig(), ConvMAEConfig(in_channels=1)
    assert found("official.pth", rgb) == found("plain.safetensors", rgb) == IMAGENET
    assert found("ours.safetensors", rgb).mean == (0.1, 0.2, 0.3)
    assert found("official.pth", gray) == ((0.449,), (0.226,))
    assert found("ours.safetensors", gray) == ((0.2,), (0.226,))
