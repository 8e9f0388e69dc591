"""Detection and instance segmentation: Mask R-CNN on the pretrained backbone, on a folder laid out as COCO.

    python examples/detection_mask_rcnn.py --data coco --weights backbone.safetensors --out detected
    torchrun --nproc-per-node 8 examples/detection_mask_rcnn.py ... --micro-batch 4

Needs a torchvision that was built for the installed torch. Prints and writes COCO's average precisions of boxes and
masks (result.json). The same command resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from coco_ap import Found, average_precision, found_object
from coco_folder import CocoFolder, check_same_categories, open_split
from command import arguments, exit_code, trained, write_result
from jitter import DETECTION_DRAWS, boxes_of, draws_of, scaled_crop
from pictures import Pixels
from pretrained import backbone, statistics
from schedule import DetectionSchedule, ScheduleError, read_schedule
from torch import Tensor, distributed, nn
from training import Ranks, TrainingError


@dataclass(frozen=True)
class Example:
    """A picture, jittered, with the objects that are left in it."""

    picture: Pixels
    """(H, W, 3)."""
    masks: Pixels
    """(N, H, W)."""
    labels: tuple[int, ...]
    """From 1."""


def load_example(data: CocoFolder, schedule: DetectionSchedule, seed: int, epoch: int, sample: int) -> Example:
    """A picture and its objects, jittered."""
    masks, labels = data.objects(sample)
    draws = draws_of(seed, epoch, sample, DETECTION_DRAWS)
    picture, masks, seen = scaled_crop(data.picture(sample), masks, draws, schedule.image_size, schedule.scale)
    return Example(picture, masks, tuple(label for label, is_seen in zip(labels, seen, strict=True) if is_seen))


def losses_of(device: torch.device, model: nn.Module, examples: list[Example]) -> dict[str, Tensor]:
    """Of the proposals, the boxes, their classes and masks."""
    targets = [
        {
            "boxes": torch.from_numpy(boxes_of(example.masks)).to(device),
            "labels": torch.tensor(example.labels, dtype=torch.long, device=device),
            "masks": torch.from_numpy(example.masks).to(device),
        }
        for example in examples
    ]
    losses: dict[str, Tensor] = model([scaled(example.picture).to(device) for example in examples], targets)
    return losses


def scaled(picture: Pixels) -> Tensor:
    """(H, W, 3) bytes -> (3, H, W) in 0 to 1, as torchvision's detectors take them."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def find(model: nn.Module, data: CocoFolder, ranks: Ranks) -> list[Found]:
    """Objects in this process's part of the pictures, in the pictures' own pixels."""
    found = []
    model.eval()
    with torch.inference_mode():
        for index in range(ranks.rank, len(data), ranks.world):
            (output,) = model([scaled(data.picture(index)).to(ranks.device)])
            masks = (output["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
            columns = (output[name].tolist() for name in ("boxes", "labels", "scores"))
            for box, label, score, mask in zip(*columns, masks, strict=True):
                found.append(found_object(data.image_ids[index], data.category_ids[label - 1], score, box, mask))
    return found


def gathered(found: list[Found], ranks: Ranks) -> list[Found]:
    """What all processes found."""
    if ranks.world == 1:
        return found
    parts: list[list[Found]] = [[] for _ in range(ranks.world)]
    distributed.all_gather_object(parts, found)
    return [row for part in parts for row in part]


def main(given: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Train and test."""
    detector = _detector()
    schedule = read_schedule(DetectionSchedule, given.schedule, given.set)
    training, validation = open_split(given.data, given.train_split), open_split(given.data, given.val_split)
    check_same_categories(training, validation)
    if schedule.classes != len(training.category_ids):
        rule = f"must be that of the annotations, {len(training.category_ids)}"
        remedy = f"give --set classes={len(training.category_ids)}"
        raise ScheduleError("classes", rule, schedule.classes, remedy)
    training = training.with_objects()
    ranks = Ranks.joined(environment)
    torch.manual_seed(given.seed)
    model = detector(
        backbone(given.weights, schedule.drop_path),
        schedule.classes,
        statistics=statistics(given.weights),
        image_size=schedule.image_size,
        channels=schedule.channels,
        regions=schedule.regions,
    ).to(ranks.device)
    identity = {"categories": list(training.categories.values())}
    step = trained(
        model,
        given,
        ranks,
        schedule=schedule,
        size=len(training),
        load=partial(load_example, training, schedule, given.seed),
        losses=partial(losses_of, ranks.device),
        identity=identity,
    )
    found = gathered(find(model, validation, ranks), ranks)
    if ranks.rank == 0:
        measured = average_precision(validation.api, found)
        write_result(given.out, step, measured)
        print(f"AP {measured['box_ap']:.1%} of boxes, {measured['mask_ap']:.1%} of masks, after step {step}")


def run(given: Sequence[str]) -> int:
    """The exit code for some words of a command line."""
    read = arguments(__doc__ or "", "coco_paper.toml", ("train2017", "val2017"), given)
    return exit_code(lambda: main(read, os.environ))


def _detector() -> Callable[..., nn.Module]:
    """Imported late, since torchvision need not be there."""
    try:
        from mask_rcnn import detector
    except (ImportError, RuntimeError) as error:  # RuntimeError: one that was built for another torch
        rule = f"must be one that was built for torch {torch.__version__}"
        reason = str(error).splitlines()[0]
        raise TrainingError("torchvision", rule, reason, "install the version that pairs with this torch") from None
    return detector


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
