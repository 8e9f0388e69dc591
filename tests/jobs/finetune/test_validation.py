from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from labelled_data import STORAGE, labelled_dataset

from jobs.finetune.training_labels import TrainingLabels
from jobs.finetune.validation import Validation
from jobs.recipe.named_recipes import named_recipe
from model import Classifier
from model.pixels import normalise
from pipeline.image.augment import center_crop
from pipeline.image.decode import decode


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting-point").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_ranks_count_what_the_model_gets_right_each_in_its_share(tmp_path: Path) -> None:
    classes = dict.fromkeys("abcdefg", 12)
    dataset = labelled_dataset(tmp_path / "data", classes, samples_per_shard=40)
    recipe = named_recipe("tiny_finetune").amended(
        {"data": dataset.url, "model.image_size": 32, "model.depth": [1, 1, 1], "global_batch_size": 4, "lanes": 2}
        | {"finetune.validation_ratio": 0.9, "finetune.classes": list(classes), "micro_batch_size": 2}
    )
    samples = TrainingLabels.of(STORAGE, recipe).validation
    assert samples and len(samples) == 7 * 11
    torch.manual_seed(0)
    model = Classifier(recipe.model, 7)
    torch.nn.init.normal_(model.head.weight)
    beats: list[None] = []

    shares = [
        Validation(STORAGE, recipe, samples, rank, 2).measure(model, torch.device("cpu"), lambda: beats.append(None))
        for rank in range(2)
    ]

    crops = [center_crop(decode(found.data), (32, 32)) for found in dataset.read(samples.sample_ids)]
    with torch.no_grad():
        logits = model.eval()(normalise(torch.from_numpy(np.stack(crops)), recipe.statistics))
    first = logits.argmax(1).numpy() == samples.labels
    among = (logits.topk(5).indices.numpy() == samples.labels[:, None]).any(1)
    assert [share["validation_samples"] for share in shares] == [64, 13]
    assert {share["validation_plan"] for share in shares} == {samples.digest}
    for share, places in zip(shares, (slice(64), slice(64, None)), strict=True):
        assert share["validation_top1"] == pytest.approx(first[places].mean())
        assert share["validation_top5"] == pytest.approx(among[places].mean())
    assert len(beats) == 2
