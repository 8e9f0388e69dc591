"""A schedule of a downstream task: what the results of a paper depend on, as a TOML file, checked where it is read."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import UserError


class ScheduleError(UserError):
    """A schedule that is impossible: an unknown field, a value of another type or out of range."""


class Schedule(BaseModel):
    """What both tasks have: the optimizer and how its learning rate goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(gt=0)
    """Updates of the weights."""
    batch_size: int = Field(gt=0)
    """Images of an update, over all processes."""
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    """Not of biases, norms and position embeddings."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from a layer of the encoder to the one below."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the last block."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate grows linearly."""
    warmup_factor: float = Field(0.001, ge=0, le=1)
    """Of the learning rate, with which the warm-up begins."""
    decay: Literal["cosine", "linear", "steps"] = "cosine"
    """After the warm-up: along a cosine or a line to 0 at the end, or by tenths at `milestones`."""
    milestones: tuple[int, ...] = ()
    """Steps after which the learning rate is a tenth of what it was."""
    classes: int = Field(gt=0)
    """Categories of the data, without a background."""

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if (self.decay == "steps") != bool(self.milestones):
            rule = "are given with decay = 'steps', and only then"
            raise ScheduleError("milestones", rule, self.milestones, "change decay or milestones")
        return self


class DetectionSchedule(Schedule):
    """Mask R-CNN."""

    image_size: int = Field(gt=0, multiple_of=32)
    """Side of the square that an image is scaled into, in pixels."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Range of large-scale jitter: by how much more than into the square an image is scaled before it is cropped."""
    channels: int = Field(256, gt=0, multiple_of=8)
    """Of the feature pyramid and the heads."""
    regions: int = Field(512, gt=0)
    """Of an image, from which the box head learns."""


class SegmentationSchedule(Schedule):
    """UPerNet."""

    image_scale: tuple[int, int] = (2048, 512)
    """Most pixels of an image's long and short side before it is jittered, and when it is tested."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the factor on `image_scale`."""
    crop: int = Field(512, gt=0, multiple_of=32)
    """Side of a crop in training, and of a window in testing, in pixels."""
    most_of_one_class: float = Field(0.75, gt=0, le=1)
    """Share of a crop's labelled pixels that one class may have; else another crop is tried, ten times."""
    slide: int = Field(341, gt=0)
    """From a window to the next in testing, in pixels."""
    channels: int = Field(768, gt=0, multiple_of=8)
    """Of the head."""
    auxiliary_channels: int = Field(256, gt=0, multiple_of=8)
    """Of the head on the third map, which helps training alone."""
    auxiliary_weight: float = Field(0.4, ge=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    """Before the last convolution of both heads."""
    zero_is_unlabelled: bool = True
    """Whether label 0 is no class, as in ADE20K; classes are counted from 1 then."""


AnySchedule = TypeVar("AnySchedule", bound=Schedule)


def learning_rate_factor(schedule: Schedule, step: int) -> float:
    """Of the learning rate, in a step; the first one is 0."""
    if schedule.decay == "steps":
        factor = 0.1 ** sum(step >= milestone for milestone in schedule.milestones)
    elif schedule.decay == "linear":
        factor = 1 - step / schedule.steps
    else:
        factor = (1 + math.cos(math.pi * step / schedule.steps)) / 2
    if step >= schedule.warmup_steps:
        return factor
    return factor * (schedule.warmup_factor + (1 - schedule.warmup_factor) * step / schedule.warmup_steps)


def read_schedule(kind: type[AnySchedule], path: Path, overrides: Sequence[str] = ()) -> AnySchedule:
    """Read a file and change fields of it.

    Args:
        kind: Of the task.
        path: A TOML file.
        overrides: `field=value`, the value as TOML has it.

    Raises:
        ScheduleError: Naming the first field that is unknown, mistyped or out of range.
    """
    try:
        fields = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ScheduleError(
            "--schedule", "must be a TOML file", str(path), f"see examples/schedules ({error})"
        ) from None
    for override in overrides:
        fields |= _override(override)
    for key in fields:
        if key not in kind.model_fields:
            raise _unknown(key, list(kind.model_fields))
    try:
        return kind(**fields)
    except ValidationError as error:
        raise _first_fault(error) from None


def _override(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise ScheduleError("--set", "must be field=value as in TOML", text, "write --set steps=1000") from None


def _unknown(key: str, known: Sequence[str]) -> ScheduleError:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
    return ScheduleError(key, "is not a field of this schedule", key, remedy)


def _first_fault(error: ValidationError) -> ScheduleError:
    fault = error.errors()[0]
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, ScheduleError):
        return cause
    rule = fault["msg"].replace("Input should", "should").replace("Field required", "is required")
    value = None if fault["type"] == "missing" else fault["input"]
    return ScheduleError(str(fault["loc"][0]), rule, value, "correct it in the schedule or by --set")
