"""The size of images by epoch (`resolution_schedule`): cheaper epochs first, those of `model.image_size` last.

A pure function of the recipe and the epoch. The model is that of `model.image_size` throughout: in epochs of another
size it is given images of that size, and interpolates its position embeddings to their patches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.errors import RecipeError
from model import ConvMAEConfig
from model.errors import ModelConfigError

FIELD = "resolution_schedule"
Size = int | tuple[int, int]
"""Side of square images, else height and width, in pixels."""
Entries = tuple[tuple[float, Size], ...]
"""The share of `epochs` after which each size begins, and the size."""
_EXAMPLE = f"write {FIELD}=[[0, 160], [0.7, 224]], or [] for one size"


@dataclass(frozen=True)
class Resolution:
    """Epochs of one size of images."""

    first_epoch: int
    """From 0."""
    stop_epoch: int
    """The one after the last."""
    model: ConvMAEConfig
    """The recipe's, with this size."""

    @property
    def text(self) -> str:
        """The size, for people."""
        height, width = self.model.image_shape
        return f"{height}x{width}"


def entries_of(value: object) -> Entries:
    """Entries as they are written, in one spelling.

    Raises:
        RecipeError: They are not pairs of a share and a size.
    """
    if not isinstance(value, list | tuple):
        raise RecipeError(FIELD, "must be a list of [share of epochs, image size]", value, _EXAMPLE)
    found = tuple(_entry(item) for item in value)
    if not found:
        return ()
    if found[0][0] != 0:
        raise RecipeError(FIELD, "must begin with the share 0", _written(found), _EXAMPLE)
    for (share, size), (later, next_size) in itertools.pairwise(found):
        if later <= share:
            rule = f"must have shares in ascending order, and {later:g} follows {share:g}"
            raise RecipeError(FIELD, rule, _written(found), "sort the entries, each share once")
        if size == next_size:
            rule = f"must change the size with each entry, and {next_size} follows {size}"
            raise RecipeError(FIELD, rule, _written(found), f"drop the entry of {later:g}")
    if len(found) == 1:
        raise RecipeError(FIELD, "must have two sizes or more, or none", _written(found), f"set {FIELD}=[]")
    return found


def resolutions_of(entries: Entries, model: ConvMAEConfig, epochs: int) -> tuple[Resolution, ...]:
    """The sizes of a run in order; without entries that of the model alone.

    A size begins with the epoch that its share of `epochs` is nearest to, the later one of two that are as near.

    Args:
        entries: Of `entries_of`.
        model: With the last size.
        epochs: Of the run.

    Raises:
        RecipeError: There can be no such image or mask, a size has no epoch, or the last is not that of the model.
    """
    if not entries:
        return (Resolution(0, epochs, model),)
    models = [_of_size(model, size) for _, size in entries]
    if models[-1].image_shape != model.image_shape:
        height, width = model.image_shape
        rule = f"must end with model.image_size = {height if height == width else [height, width]}"
        remedy = "change the last entry, or model.image_size"
        raise RecipeError(FIELD, rule, _written(entries), remedy)
    firsts = [*(math.floor(share * epochs + 0.5) for share, _ in entries), epochs]
    for (share, size), (first, stop) in zip(entries, itertools.pairwise(firsts), strict=True):
        if first >= stop:
            rule = f"must leave each size an epoch of the {epochs:,}, and {size} of {share:g} has none"
            raise RecipeError(FIELD, rule, _written(entries), "set shares farther apart and below 1, or more epochs")
    return tuple(Resolution(*span, each) for span, each in zip(itertools.pairwise(firsts), models, strict=True))


def resolution_at(resolutions: Sequence[Resolution], epoch: int) -> Resolution:
    """That of an epoch, from 0."""
    return resolutions[bisect_right(resolutions, epoch, key=lambda each: each.first_epoch) - 1]


def largest_resolution(resolutions: Sequence[Resolution]) -> Resolution:
    """The first of those with the most patches, which decide how many images fit into memory."""
    return max(resolutions, key=lambda each: each.model.patches)


def resolutions_text(resolutions: Sequence[Resolution]) -> str:
    """For people: each size, and with which epoch it begins."""
    first, *others = resolutions
    return "; ".join([first.text, *(f"{each.text} from epoch {each.first_epoch:,}" for each in others)])


def _entry(item: object) -> tuple[float, Size]:
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise RecipeError(FIELD, "must be a list of [share of epochs, image size]", item, _EXAMPLE)
    share, size = item
    if type(share) not in (int, float) or not 0 <= share < 1:
        rule = "must have shares of the epochs, from 0 up to, but not including, 1"
        raise RecipeError(FIELD, rule, share, "write 0.7 for what begins after seven tenths of the epochs")
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or any(type(side) is not int for side in sides):
        raise RecipeError(FIELD, "must have sizes in pixels, a whole number or [height, width]", size, _EXAMPLE)
    height, width = sides
    return share + 0.0, height if height == width else (height, width)


def _of_size(model: ConvMAEConfig, size: Size) -> ConvMAEConfig:
    try:
        return dataclasses.replace(model, image_size=size)
    except ModelConfigError as error:
        rule = f"must have sizes that the model can be given: {error.field} {error.rule}"
        raise RecipeError(FIELD, rule, size, f"{error.remedy}, or another size") from error


def _written(entries: Entries) -> Sequence[Sequence[object]]:
    return [[share, list(size) if isinstance(size, tuple) else size] for share, size in entries]
