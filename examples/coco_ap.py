"""Average precision of boxes and masks, by pycocotools' COCOeval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Found = dict[str, Any]
"""An object as COCO's result files have it: image_id, category_id, score, bbox (x, y, width, height), segmentation."""

_FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def found_object(image_id: int, category_id: int, score: float, corners: Sequence[float], mask: Any) -> Found:
    """One object for `average_precision`.

    Args:
        image_id: As in the annotations.
        category_id: As in the annotations.
        score: Higher is surer.
        corners: Left, top, right and bottom, in pixels.
        mask: (H, W) of 0 and 1, of the picture's size.
    """
    left, top, right, bottom = corners
    return {
        "image_id": image_id,
        "category_id": category_id,
        "score": score,
        "bbox": [left, top, right - left, bottom - top],
        "segmentation": rle.encode(np.asfortranarray(mask, dtype=np.uint8)),
    }


def average_precision(api: COCO, found: Sequence[Found]) -> dict[str, float]:
    """AP over ten thresholds, AP at 0.5 and 0.75 and by size, in 0 to 1, as `box_ap` and `mask_ap` and so on.

    -1, as COCO has it, where there is no object of a size.
    """
    figures: dict[str, float] = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(api, _results(api, found, kind), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        figures |= {f"{name}_{key}": float(value) for key, value in zip(_FIGURES, evaluation.stats[:6], strict=True)}
    return figures


def _results(api: COCO, found: Sequence[Found], kind: str) -> COCO:
    """As COCO.loadRes, which cannot take an empty list, and which gives masks the boxes' area when it has both."""
    results = COCO()
    results.dataset = {name: api.dataset[name] for name in ("images", "categories")}
    results.dataset["annotations"] = [
        {**row, "id": place + 1, "iscrowd": 0, "area": _area(row, kind)} for place, row in enumerate(found)
    ]
    results.createIndex()
    return results


def _area(row: Found, kind: str) -> float:
    return float(rle.area(row["segmentation"])) if kind == "segm" else float(row["bbox"][2] * row["bbox"][3])
