"""Small data sets laid out as ADE20K and COCO: a red square and a green disc on dark noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

BACKGROUND, SQUARE, DISC = 1, 2, 3
"""Values in class maps; 0 is a frame of two pixels that is unlabelled."""

Box = tuple[int, int, int, int]


def write_ade(root: Path, split: str, count: int, side: int = 64) -> None:
    """Pictures and class maps of three classes."""
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True)
    for number, (picture, square, disc) in enumerate(_scenes(split, count, side)):
        labels = Image.new("L", (side, side), 0)
        draw = ImageDraw.Draw(labels)
        draw.rectangle((2, 2, side - 3, side - 3), fill=BACKGROUND)
        draw.rectangle(square, fill=SQUARE)
        draw.ellipse(disc, fill=DISC)
        picture.save(root / "images" / split / f"{number:03}.jpg", quality=95, subsampling=0)
        labels.save(root / "annotations" / split / f"{number:03}.png")


def write_coco(root: Path, split: str, count: int, side: int = 128) -> Path:
    """Pictures and annotations of two categories, whose ids have a gap; returns the annotation file."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    for number, (picture, square, disc) in enumerate(_scenes(split, count, side)):
        name = f"{number:03}.jpg"
        picture.save(root / split / name, quality=95, subsampling=0)
        images.append({"id": number + 10, "file_name": name, "width": side, "height": side})
        for category, box, outline in ((3, square, _corners(square)), (7, disc, _circle(disc))):
            left, top, right, bottom = box
            annotations.append(
                {
                    "id": len(annotations),  # the first is 0, which pycocotools takes for no match
                    "image_id": number + 10,
                    "category_id": category,
                    "bbox": [left, top, right - left + 1, bottom - top + 1],
                    "segmentation": [outline],
                }
            )
    categories = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def _scenes(split: str, count: int, side: int) -> list[tuple[Image.Image, Box, Box]]:
    draws = np.random.default_rng([len(split), count])
    scenes = []
    for _ in range(count):
        picture = Image.fromarray(draws.integers(0, 80, (side, side, 3), np.uint8))
        size = side // 3
        halves = draws.permutation(2) * (side // 2)  # one in the left half, one in the right
        boxes = []
        for half in halves.tolist():
            left, top = half + int(draws.integers(3, side // 2 - size - 3)), int(draws.integers(3, side - size - 3))
            boxes.append((left, top, left + size - 1, top + size - 1))
        draw = ImageDraw.Draw(picture)
        draw.rectangle(boxes[0], fill=(230, 40, 40))
        draw.ellipse(boxes[1], fill=(40, 230, 40))
        scenes.append((picture, boxes[0], boxes[1]))
    return scenes


def _corners(box: Box) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right + 1, top, right + 1, bottom + 1, left, bottom + 1]


def _circle(box: Box) -> list[float]:
    left, top, right, bottom = box
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    x = (left + right + 1) / 2 + (right + 1 - left) / 2 * np.cos(angles)
    y = (top + bottom + 1) / 2 + (bottom + 1 - top) / 2 * np.sin(angles)
    return np.stack([x, y], axis=1).flatten().tolist()
