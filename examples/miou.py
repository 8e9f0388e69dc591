"""Mean intersection over union of a whole data set, by torchmetrics.

From one confusion matrix over all pixels of all pictures, as ADE20K's figures are; not the mean of the pictures' own.
"""

from __future__ import annotations

from pictures import UNLABELLED
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex


def segmentation_metrics(classes: int) -> MetricCollection:
    """To be updated with (pixels,) predicted and labelled classes; sums over processes where there are several."""
    return MetricCollection(
        {
            # A class that neither is labelled nor predicted anywhere is left out of the mean.
            "miou": MulticlassJaccardIndex(classes, average="macro", ignore_index=UNLABELLED, validate_args=False),
            "iou": MulticlassJaccardIndex(classes, average="none", ignore_index=UNLABELLED, validate_args=False),
            "pixel_accuracy": MulticlassAccuracy(
                classes, average="micro", ignore_index=UNLABELLED, validate_args=False
            ),
        },
        compute_groups=False,
    )


def figures(metrics: MetricCollection) -> dict[str, float | list[float]]:
    """`miou` and `pixel_accuracy` in 0 to 1, and `iou` of each class."""
    values: dict[str, Tensor] = metrics.compute()
    return {name: value.tolist() for name, value in values.items()}
