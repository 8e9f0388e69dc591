"""Semantic segmentation: UPerNet on the pretrained backbone, trained and tested on a folder laid out as ADE20K.

    python examples/segmentation_upernet.py --data ADEChallengeData2016 --weights backbone.safetensors --out segmented
    torchrun --nproc-per-node 8 examples/segmentation_upernet.py ... --micro-batch 2

Prints and writes the mean intersection over union (result.json). The same command resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from ade_folder import AdeFolder, open_split
from command import arguments, exit_code, trained, write_result
from jitter import SEGMENTATION_DRAWS, draws_of, fitted, labelled_crop
from miou import figures, segmentation_metrics
from pictures import UNLABELLED, Pixels
from pretrained import backbone, statistics
from schedule import SegmentationSchedule, read_schedule
from torch import Tensor, nn
from torch.nn import functional
from training import Ranks
from upernet import UPerNet

from model import ChannelStatistics, normalise

Crop = tuple[Pixels, Pixels]


def segmenter(given: argparse.Namespace, schedule: SegmentationSchedule) -> UPerNet:
    """The model, before training."""
    return UPerNet(
        backbone(given.weights, schedule.drop_path),
        schedule.classes,
        channels=schedule.channels,
        auxiliary_channels=schedule.auxiliary_channels,
        auxiliary_weight=schedule.auxiliary_weight,
        dropout=schedule.dropout,
    )


def load_crop(data: AdeFolder, schedule: SegmentationSchedule, seed: int, epoch: int, sample: int) -> Crop:
    """A picture and its labels, jittered."""
    return labelled_crop(
        *data.sample(sample),
        draws_of(seed, epoch, sample, SEGMENTATION_DRAWS),
        image_scale=schedule.image_scale,
        scale=schedule.scale,
        side=schedule.crop,
        most_of_one_class=schedule.most_of_one_class,
    )


def losses_of(
    side: int, statistics: ChannelStatistics, device: torch.device, model: nn.Module, crops: list[Crop]
) -> dict[str, Tensor]:
    """Of some crops, filled to squares with the mean colour and without labels."""
    images = torch.zeros(len(crops), 3, side, side)
    labels = torch.full((len(crops), side, side), UNLABELLED, dtype=torch.long)
    for image, label, (picture, classes) in zip(images, labels, crops, strict=True):
        rows, columns = classes.shape
        image[:, :rows, :columns] = normalised(picture, statistics)
        label[:rows, :columns] = torch.from_numpy(np.array(classes))
    losses: dict[str, Tensor] = model(images.to(device), labels.to(device))
    return losses


def normalised(picture: Pixels, statistics: ChannelStatistics) -> Tensor:
    """(H, W, 3) bytes -> (3, H, W)."""
    return normalise(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], statistics)[0]


def logits_of_windows(model: nn.Module, image: Tensor, side: int, stride: int) -> Tensor:
    """The mean of the logits of overlapping windows, of which the last lie at the edges, as mmsegmentation has it.

    Args:
        model: Gives logits of every pixel.
        image: (3, H, W), normalised.
        side: Of a window.
        stride: From a window to the next.

    Returns:
        (classes, H, W).
    """
    height, width = image.shape[1:]
    filled = functional.pad(image, (0, max(0, side - width), 0, max(0, side - height)))
    rows, columns = filled.shape[1:]
    sums: Tensor | None = None
    times = image.new_zeros(rows, columns)
    for top in _starts(rows, side, stride):
        for left in _starts(columns, side, stride):
            place = slice(top, top + side), slice(left, left + side)
            (logits,) = model(filled[:, *place][None])
            if sums is None:
                sums = logits.new_zeros(len(logits), rows, columns)
            sums[:, *place] += logits
            times[place] += 1
    assert sums is not None
    return (sums / times)[:, :height, :width]


def test(
    model: UPerNet, statistics: ChannelStatistics, data: AdeFolder, schedule: SegmentationSchedule, ranks: Ranks
) -> dict[str, object]:
    """Mean intersection over union, that of each class, and the accuracy of pixels: over all processes' pictures."""
    metrics = segmentation_metrics(schedule.classes).to(ranks.device)
    model.eval()
    with torch.inference_mode():
        for index in range(ranks.rank, len(data), ranks.world):
            picture, labels = data.sample(index)
            shown = fitted(picture, max(schedule.image_scale), min(schedule.image_scale))
            image = normalised(shown, statistics).to(ranks.device)
            logits = logits_of_windows(model, image, schedule.crop, schedule.slide)
            whole = functional.interpolate(logits[None], labels.shape, mode="bilinear", align_corners=False)
            wanted = torch.from_numpy(np.array(labels)).long().to(ranks.device)
            metrics.update(whole[0].argmax(0).flatten(), wanted.flatten())
    return dict(figures(metrics))


def main(given: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Train and test."""
    schedule = read_schedule(SegmentationSchedule, given.schedule, given.set)
    opened = partial(open_split, given.data, classes=schedule.classes, zero_is_unlabelled=schedule.zero_is_unlabelled)
    training, validation = opened(split=given.train_split), opened(split=given.val_split)
    ranks = Ranks.joined(environment)
    torch.manual_seed(given.seed)
    model, channels = segmenter(given, schedule).to(ranks.device), statistics(given.weights)
    identity = {"classes": schedule.classes}
    step = trained(
        model,
        given,
        ranks,
        schedule=schedule,
        size=len(training),
        load=partial(load_crop, training, schedule, given.seed),
        losses=partial(losses_of, schedule.crop, channels, ranks.device),
        identity=identity,
    )
    measured = test(model, channels, validation, schedule, ranks)
    if ranks.rank == 0:
        write_result(given.out, step, measured)
        print(f"mIoU {measured['miou']:.1%}, pixels {measured['pixel_accuracy']:.1%}, after step {step}")


def run(given: Sequence[str]) -> int:
    """The exit code for some words of a command line."""
    read = arguments(__doc__ or "", "ade20k_paper.toml", ("training", "validation"), given)
    return exit_code(lambda: main(read, os.environ))


def _starts(length: int, side: int, stride: int) -> list[int]:
    return sorted({min(start, length - side) for start in range(0, max(1, length - side + stride), stride)})


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
