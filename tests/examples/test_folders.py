"""Folders laid out as COCO and ADE20K: what is read, and what is refused; what augmentation makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ade_folder
import coco_folder
import numpy as np
import pytest
from jitter import SEGMENTATION_DRAWS, boxes_of, distorted, draws_of, labelled_crop, scaled_crop
from made_scenes import write_ade, write_coco
from pictures import DataError
from PIL import Image

GRADIENT = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)
HOW: dict[str, Any] = {"image_scale": (64, 32), "scale": (1, 1), "side": 32, "most_of_one_class": 0.75}


def test_objects_of_coco_are_their_outlines_and_classes(tmp_path: Path) -> None:
    """A square of 21 pixels and a disc of as many, whose area is that of its 32 corners."""
    write_coco(tmp_path, "train", 3, side=64)

    data = coco_folder.open_split(tmp_path, "train")
    masks, labels = data.objects(1)

    assert data.categories == {3: "square", 7: "disc"}
    assert labels == [1, 2]
    assert masks[0].sum() == 21**2
    assert masks[1].sum() == pytest.approx(16 * np.sin(np.pi / 16) * 10.5**2, rel=0.05)
    red = data.picture(1)[..., 0] > 150
    assert (red == masks[0]).mean() > 0.98


def test_crowds_and_pictures_without_objects_are_not_trained_on(tmp_path: Path) -> None:
    def crowd(content: dict[str, Any]) -> None:
        content["annotations"][0]["iscrowd"] = content["annotations"][1]["iscrowd"] = 1
        del content["annotations"][2:4]
        content["annotations"][2]["iscrowd"] = 1

    rewrite(write_coco(tmp_path, "train", 3, side=64), crowd)

    data = coco_folder.open_split(tmp_path, "train").with_objects()

    assert data.image_ids == (12,)
    assert data.objects(0)[1] == [2]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].update(file_name="gone.jpg"), "must name pictures that are there, got 'gone.jpg'"),
        (lambda c: c["annotations"][1].update(image_id=99), r"\[1\]\.image_id: must be an id of images, got 99"),
        (lambda c: c["annotations"][1].update(category_id=99), "category_id: must be an id of categories, got 99"),
        (lambda c: c["annotations"][1].pop("segmentation"), "must have segmentation"),
        (lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]), "polygons of at least three points"),
        (lambda c: c["annotations"][1].update(segmentation={"counts": "1", "size": [2, 3]}), "size, 64x64, got '3x2'"),
        (lambda c: c["images"][1].update(id=10), "images: must have ids of their own, got 10"),
        (lambda c: c.pop("categories"), "must have a list of objects called categories"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(write_coco(tmp_path, "train", 2, side=64), change)

    with pytest.raises(DataError, match=message):
        coco_folder.open_split(tmp_path, "train")


def test_folders_files_sizes_and_categories_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data: must have this file of JSON, got '.*instances_train.json \(FileNot"):
        coco_folder.open_split(tmp_path, "train")
    write_coco(tmp_path, "train", 1, side=64)
    rewrite(write_coco(tmp_path, "val", 1, side=64), lambda c: c["categories"][1].update(name="box"))
    train, validation = (coco_folder.open_split(tmp_path, split) for split in ("train", "val"))
    with pytest.raises(DataError, match="category 3 of val: must be 'square' as in train, got 'box'"):
        coco_folder.check_same_categories(train, validation)
    Image.new("RGB", (64, 32)).save(tmp_path / "train" / "000.jpg")
    with pytest.raises(DataError, match="must have the size in its annotations, 64x64, got '64x32'"):
        train.picture(0)
    (tmp_path / "train" / "000.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="must be a whole picture"):
        train.picture(0)


def test_classes_of_ade_count_from_one_and_zero_is_unlabelled(tmp_path: Path) -> None:
    write_ade(tmp_path, "training", 2)

    data = ade_folder.open_split(tmp_path, "training", 3, zero_is_unlabelled=True)
    picture, labels = data.sample(1)

    assert set(np.unique(labels).tolist()) == {0, 1, 2, 255}
    assert (labels == 255).sum() == 64**2 - 60**2
    assert (labels == 1).sum() == 21**2
    assert ((picture[..., 0] > 150) == (labels == 1)).mean() > 0.98
    raw = ade_folder.open_split(tmp_path, "training", 4, zero_is_unlabelled=False).sample(1)[1]
    assert set(np.unique(raw).tolist()) == {0, 1, 2, 3}


def test_maps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def opened(classes: int = 3) -> ade_folder.AdeFolder:
        return ade_folder.open_split(tmp_path, "training", classes, zero_is_unlabelled=True)

    with pytest.raises(DataError, match="--data: must have this folder"):
        opened()
    write_ade(tmp_path, "training", 2)
    with pytest.raises(DataError, match="must have values up to 2, or 255 for unlabelled, got 3"):
        opened(2).sample(0)
    Image.new("L", (64, 60), 1).save(tmp_path / "annotations" / "training" / "001.png")
    with pytest.raises(DataError, match="must have the size of its picture, 64x64, got '64x60'"):
        opened()
    (tmp_path / "annotations" / "training" / "001.png").unlink()
    with pytest.raises(DataError, match="must have a map for each picture, got '001'"):
        opened()


def test_jitter_by_one_changes_nothing_and_mirrors_by_half() -> None:
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[0, 10:20, 30:50] = 1

    same, masks, seen = scaled_crop(GRADIENT, mask, np.array([0, 0, 0, 0.5]), 64, (1, 1))
    mirrored, turned, _ = scaled_crop(GRADIENT, mask, np.array([0, 0, 0, 0.4]), 64, (1, 1))

    assert (same == GRADIENT).all()
    assert (masks == mask).all()
    assert seen.tolist() == [True]
    assert (mirrored == GRADIENT[:, ::-1]).all()
    assert boxes_of(masks).tolist() == [[30, 10, 50, 20]]
    assert boxes_of(turned).tolist() == [[14, 10, 34, 20]]


def test_what_a_crop_cuts_off_is_no_object_of_it() -> None:
    """Twice as large, the upper left quarter is seen."""
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, 10:20, 30:50] = masks[1, 40:50, 40:50] = 1

    picture, left, seen = scaled_crop(GRADIENT, masks, np.array([1, 0, 0, 0.9]), 64, (1, 2))

    assert picture.shape == (64, 64, 3)
    assert seen.tolist() == [True, False]
    assert boxes_of(left).tolist() == [[60, 20, 64, 40]]


def test_a_picture_that_jitter_makes_smaller_is_whole() -> None:
    picture, masks, seen = scaled_crop(GRADIENT[:32], np.ones((1, 32, 64), np.uint8), np.zeros(4) + 0.5, 64, (0.5, 0.5))

    assert picture.shape == (16, 32, 3)
    assert masks.all()
    assert seen.all()


def test_a_crop_of_one_class_is_tried_again() -> None:
    """The left window is all of class 0; the second, in the middle, has both. Of all alike, the last is taken."""
    labels = np.repeat(np.array([[0, 1]], np.uint8), 32, axis=1).repeat(32, axis=0)
    picture = np.repeat(labels[..., None] * 100, 3, axis=2)
    draws = np.full(SEGMENTATION_DRAWS, 0.9)
    draws[1:3], draws[3:5] = (0, 0), (0, 0.5)

    cut, classes = labelled_crop(picture, labels, draws, **HOW)

    assert classes[0].tolist() == [0] * 16 + [1] * 16
    assert (cut[..., 0] == classes * 100).all()
    _, alone = labelled_crop(picture * 0, labels * 0, draws, **HOW)
    assert alone.shape == (32, 32)


def test_colours_are_distorted_within_bounds_or_not_at_all() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)

    assert (distorted(GRADIENT, np.full(8, 0.9)) == GRADIENT).all()
    brighter = distorted(grey, np.array([0, 1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]))
    assert (brighter == 132).all()
    darker = distorted(grey, np.array([0.9, 0.9, 0, 0, 0.9, 0.9, 0.9, 0.9]))
    assert (darker == 50).all()
    red = np.zeros((1, 1, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    turned = distorted(red, np.array([0.9] * 6 + [0, 1]))[0, 0]
    assert turned[0] == 200
    assert 100 < turned[1] < 140  # 36 degrees towards yellow: 200 x 0.6
    assert turned[2] == 0


def test_draws_are_functions_of_seed_epoch_and_sample() -> None:
    base = draws_of(1, 2, 3, 5)

    assert (draws_of(1, 2, 3, 5) == base).all()
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (draws_of(*other, 5) != base).all()
