"""A folder of pictures with objects outlined, laid out as COCO.

annotations/instances_train2017.json    train2017/*.jpg
annotations/instances_val2017.json      val2017/*.jpg
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pictures import DataError, Pixels, read_pixels
from pycocotools import mask as rle
from pycocotools.coco import COCO

Row = Mapping[str, Any]
"""Of one of the lists of an annotation file."""

_NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id", "bbox", "segmentation"),
}


@dataclass(frozen=True)
class CocoFolder:
    """One split; made by `open_split`. Images are in the order of their ids, classes in that of the categories' ids."""

    pictures: Path
    api: COCO
    category_ids: tuple[int, ...]
    image_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def categories(self) -> dict[int, str]:
        """Names by id."""
        return {number: str(self.api.cats[number]["name"]) for number in self.category_ids}

    def picture(self, index: int) -> Pixels:
        """(H, W, 3).

        Raises:
            DataError: If the file is no picture, or not of the size that its annotations count with.
        """
        row = self.api.imgs[self.image_ids[index]]
        path = self.pictures / row["file_name"]
        pixels = read_pixels(path, "RGB")
        height, width = pixels.shape[:2]
        if (width, height) != (row["width"], row["height"]):
            rule = f"must have the size in its annotations, {row['width']}x{row['height']}"
            remedy = "annotate the picture as it is stored, or store it as it was annotated"
            raise DataError(str(path), rule, f"{width}x{height}", remedy)
        return pixels

    def objects(self, index: int) -> tuple[Pixels, list[int]]:
        """(N, H, W) masks of 0 and 1, and their classes from 1, since 0 is the background. Crowds are left out."""
        number = self.image_ids[index]
        rows = [row for row in self.api.imgToAnns[number] if not row["iscrowd"]]
        image = self.api.imgs[number]
        masks = [rle.decode(self.api.annToRLE(row)) for row in rows]
        labels = [self.category_ids.index(row["category_id"]) + 1 for row in rows]
        return np.stack(masks) if masks else np.zeros((0, image["height"], image["width"]), np.uint8), labels

    def with_objects(self) -> CocoFolder:
        """Those images that have an object that is no crowd: what is trained on, as the official code does."""
        kept = [n for n in self.image_ids if any(not row["iscrowd"] for row in self.api.imgToAnns[n])]
        if not kept:
            remedy = "annotate it, or choose another --train-split"
            raise DataError(str(self.pictures), "must have an image with an object", "none", remedy)
        return CocoFolder(self.pictures, self.api, self.category_ids, tuple(kept))


def open_split(root: Path, split: str) -> CocoFolder:
    """Read the annotations of a split, and look for its pictures.

    Raises:
        DataError: If the file or folder is missing, a row lacks a field or names what there is not, or a picture is
            missing.
    """
    path, pictures = root / "annotations" / f"instances_{split}.json", root / split
    lists = _read(path)
    for name, fields in _NEEDED.items():
        _check_fields(path, name, lists[name], fields)
    for name in ("images", "categories"):
        _check_unique(path, name, lists[name])
    _check_references(path, lists)
    if not pictures.is_dir():
        raise DataError("--data", "must have this folder", str(pictures), "lay the data out as COCO: SPLIT/*.jpg")
    for row in lists["images"]:
        if not (pictures / row["file_name"]).is_file():
            remedy = f"add it to {pictures}, or take image {row['id']} out of the file"
            raise DataError(str(path), "must name pictures that are there", row["file_name"], remedy)
    api = COCO()
    api.dataset = {**lists, "annotations": _completed(path, lists)}
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return CocoFolder(pictures, api, tuple(sorted(api.cats)), tuple(sorted(api.imgs)))


def check_same_categories(train: CocoFolder, validation: CocoFolder) -> None:
    """Refuse splits whose ids or names differ: a class would be another one in testing than in training.

    Raises:
        DataError: Naming the first that differs.
    """
    ours, theirs = train.categories, validation.categories
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) != theirs.get(number):
            rule = f"must be {ours.get(number, 'no category')!r} as in {train.pictures.name}"
            remedy = "write both files with the same list of categories"
            raise DataError(
                f"category {number} of {validation.pictures.name}", rule, theirs.get(number, "no category"), remedy
            )


def _read(path: Path) -> dict[str, list[Row]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        rule = "must have this file of JSON"
        remedy = "lay the data out as COCO, or name its parts by --train-split and --val-split"
        raise DataError("--data", rule, f"{path} ({type(error).__name__})", remedy) from None
    for name in _NEEDED:
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(str(path), f"must have a list of objects called {name}", None, "write it as COCO has it")
        if not rows and name != "annotations":
            raise DataError(str(path), f"must have {name}", "none", "write it as COCO has it")
    return {name: content[name] for name in _NEEDED}


def _check_fields(path: Path, name: str, rows: Sequence[Row], fields: Sequence[str]) -> None:
    for place, row in enumerate(rows):
        for field in fields:
            if field not in row:
                why = "; Mask R-CNN learns outlines, too" if field == "segmentation" else ""
                raise DataError(f"{path}: {name}[{place}]", f"must have {field}", sorted(row), f"add it{why}")


def _check_unique(path: Path, name: str, rows: Sequence[Row]) -> None:
    ((number, times),) = Counter(row["id"] for row in rows).most_common(1)
    if times > 1:
        raise DataError(f"{path}: {name}", "must have ids of their own", number, "renumber them")


def _check_references(path: Path, lists: Mapping[str, Sequence[Row]]) -> None:
    for field, name in (("image_id", "images"), ("category_id", "categories")):
        known = {row["id"] for row in lists[name]}
        for place, row in enumerate(lists["annotations"]):
            if row[field] not in known:
                rule, remedy = f"must be an id of {name}", f"add it to {name}, or remove the row"
                raise DataError(f"{path}: annotations[{place}].{field}", rule, row[field], remedy)


def _completed(path: Path, lists: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Annotations with what COCOeval takes for granted.

    Ids count from 1: it takes a match with an object whose id is 0 for none.
    """
    sizes = {row["id"]: (row["height"], row["width"]) for row in lists["images"]}
    completed = []
    for place, row in enumerate(lists["annotations"]):
        outline = _outline(f"{path}: annotations[{place}]", row["segmentation"], *sizes[row["image_id"]])
        defaults = {"iscrowd": 0, "area": float(rle.area(outline))}
        completed.append({**defaults, **row, "id": place + 1, "segmentation": outline})
    return completed


def _outline(field: str, given: object, height: int, width: int) -> dict[str, Any]:
    """Polygons or run lengths as compressed run lengths."""
    # Two points are no area, and pycocotools takes a list of four numbers for a box.
    usable = [part for part in given if isinstance(part, list) and len(part) >= 6] if isinstance(given, list) else given
    rule = "must have a segmentation of polygons of at least three points, or of run lengths"
    if not usable:
        raise DataError(field, rule, given, "correct or remove the row")
    try:
        outline: dict[str, Any] = _compressed(usable, height, width)
        size = tuple(outline["size"])
    except Exception as error:  # pycocotools raises no narrower one
        raise DataError(field, rule, given, f"correct or remove the row ({type(error).__name__})") from None
    if size != (height, width):
        rule = f"must have a segmentation of its picture's size, {width}x{height}"
        raise DataError(field, rule, "x".join(str(side) for side in reversed(size)), "correct or remove the row")
    return outline


def _compressed(given: Any, height: int, width: int) -> Any:
    if isinstance(given, list):
        return rle.merge(rle.frPyObjects(given, height, width))
    return rle.frPyObjects(given, height, width) if isinstance(given["counts"], list) else given
