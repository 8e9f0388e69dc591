"""Mean IoU and average precision against cases that are worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coco_ap import Found, average_precision, found_object
from coco_folder import CocoFolder, open_split
from made_scenes import write_coco
from miou import figures, segmentation_metrics


def test_iou_is_of_the_whole_data_set_and_leaves_out_what_is_unlabelled_or_nowhere() -> None:
    """Class 0: 2 of 3; class 1: 1 of 3; class 2: 0 of 1; class 3 is nowhere. The mean of the pictures' own is 3/8."""
    metrics = segmentation_metrics(4)
    metrics.update(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 255]))
    metrics.update(torch.tensor([0, 0]), torch.tensor([0, 1]))

    measured = figures(metrics)

    assert measured["iou"] == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert measured["miou"] == pytest.approx(1 / 3)
    assert measured["pixel_accuracy"] == pytest.approx(3 / 5)


@pytest.fixture
def scenes(tmp_path: Path) -> CocoFolder:
    write_coco(tmp_path, "val", 1, side=64)
    return open_split(tmp_path, "val")


def truth(scenes: CocoFolder, score: float = 1.0) -> list[Found]:
    """What there is, as a detector would find it."""
    masks, labels = scenes.objects(0)
    boxes = [scenes.api.imgToAnns[scenes.image_ids[0]][number]["bbox"] for number in range(len(labels))]
    return [
        found_object(scenes.image_ids[0], scenes.category_ids[label - 1], score, (x, y, x + w, y + h), mask)
        for label, (x, y, w, h), mask in zip(labels, boxes, masks, strict=True)
    ]


def test_who_finds_all_has_an_ap_of_one_also_of_the_object_with_id_0(scenes: CocoFolder) -> None:
    measured = average_precision(scenes.api, truth(scenes))

    assert measured["box_ap"] == pytest.approx(1)
    assert measured["mask_ap"] == pytest.approx(1)
    assert measured["box_ap_large"] == -1


def test_who_finds_nothing_has_an_ap_of_zero(scenes: CocoFolder) -> None:
    measured = average_precision(scenes.api, [])

    assert measured["box_ap"] == measured["mask_ap"] == 0


def test_of_two_categories_one_found_is_half_and_an_error_that_is_surer_halves_it_again(scenes: CocoFolder) -> None:
    square, _ = truth(scenes, 0.5)
    elsewhere = found_object(square["image_id"], square["category_id"], 0.9, (0, 0, 2, 2), np.eye(64, dtype=np.uint8))

    assert average_precision(scenes.api, [square])["box_ap"] == pytest.approx(0.5)
    measured = average_precision(scenes.api, [square, elsewhere])
    assert measured["box_ap"] == pytest.approx(0.25)
    assert measured["mask_ap"] == pytest.approx(0.25)


def test_a_mask_is_measured_apart_from_its_box(scenes: CocoFolder) -> None:
    """12 of a square's 21 rows pass 0.5 and 0.55; of a disc they are 59 %, which may pass 0.6 by rounding."""
    cut = []
    for row, mask in zip(truth(scenes), scenes.objects(0)[0], strict=True):
        left, top, width, height = row["bbox"]
        half = mask.copy()
        half[int(top + 0.6 * height) :] = 0
        cut.append(found_object(row["image_id"], row["category_id"], 1, (left, top, left + width, top + height), half))

    measured = average_precision(scenes.api, cut)

    assert measured["box_ap"] == pytest.approx(1)
    assert 0.199 < measured["mask_ap"] < 0.251
