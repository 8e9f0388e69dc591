"""The part of a recipe that makes it a fine-tuning: a classifier in place of the reconstruction, and how it is trained.

Defaults are those of the paper's fine-tuning (Gao et al. 2022, arXiv:2205.03892, appendix; FINETUNE.md and
main_finetune.py of github.com/Alpha-VL/ConvMAE).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jobs.errors import RecipeError

PLACEMENT_FIELDS = frozenset({"validation_data", "validation_labels", "validate_epochs"})
"""Of a fine-tuning: what may change when a run is resumed. They decide what is measured, not what is trained."""


class Finetune(BaseModel):
    """How a classifier is trained from pretrained weights (`finetune.<field>`). Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: Literal["full", "linear"] = "full"
    """What is trained: all weights (`full`), or a linear head behind a batch norm, on frozen features (`linear`)."""
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    """`lars` and `sgd`, with momentum 0.9, are for `linear`."""
    labels: str = ""
    """URL of a list of labels for `data`: key, tab, label in each line. Empty: the data set's own."""
    label_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the labels of each class that is trained with, at least one a class, chosen by a hash of sample ids."""
    split_seed: int = Field(default=0, ge=0, lt=2**63)
    """Of that choice, and of `validation_ratio`'s."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the head's outputs; determined when a run begins."""
    samples_sha256: str = ""
    """SHA-256 of the ids and labels that are trained with; determined when a run begins."""

    validation_data: str = ""
    """URL of a labelled data set of the same classes to measure accuracy on. Empty: see `validation_ratio`."""
    validation_labels: str = ""
    """URL of a list of labels for `validation_data`. Empty: the data set's own."""
    validation_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of each class of `data` that is measured on and not trained with, where there is no `validation_data`."""
    validate_epochs: int = Field(default=1, ge=0, le=10**9)
    """Epochs between two measurements; also at the end. 0: only there."""

    least_crop: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of an image's area that a random crop shows; the largest is all of it."""
    randaugment_operations: int = Field(default=2, ge=0, le=16)
    """Operations of RandAugment on each image; 0: none."""
    randaugment_magnitude: float = Field(default=9.0, ge=0, le=10)
    """Their mean magnitude, of 10; its standard deviation is 0.5."""
    erasing: float = Field(default=0.25, ge=0, le=1)
    """Probability that a rectangle of an image is replaced by noise."""
    mixup: float = Field(default=0.8, ge=0, le=1000)
    """Both parameters of the Beta distribution of mixup's weights; 0: no mixup."""
    cutmix: float = Field(default=1.0, ge=0, le=1000)
    """The same of CutMix's; 0: no CutMix. With both, each group of images has one of them, by a fair draw."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of each target that is spread over all classes."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping the last block's branches; grows linearly from 0 at the first block."""
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    """Factor of the learning rate from one block of stage 3 to the one below; stages 1 and 2 count as one layer."""
    min_learning_rate: float = Field(default=1e-6, ge=0)
    """At the end of the schedule, before layers' factors."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.kind == "full" and self.optimizer != "adamw":
            raise RecipeError(
                "finetune.optimizer", "must be adamw where all weights are trained", self.optimizer, "or kind=linear"
            )
        if self.validation_labels and not self.validation_data:
            remedy = "give finetune.validation_data too, or leave it out"
            raise RecipeError("finetune.validation_labels", "needs validation_data", self.validation_labels, remedy)
        if self.validation_data and self.validation_ratio:
            remedy = "give one of the two"
            raise RecipeError(
                "finetune.validation_ratio", "must be 0 with validation_data", self.validation_ratio, remedy
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def trained_ratio(self) -> float:
        """Share of all labelled samples that is trained with, but for the rounding in each class."""
        return (1 - self.validation_ratio) * self.label_fraction

    @property
    def has_validation(self) -> bool:
        """Whether accuracy is measured while it trains."""
        return bool(self.validation_data or self.validation_ratio)
