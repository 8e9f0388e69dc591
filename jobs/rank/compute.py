"""What the ranks of a group compute in a step, and what their devices could."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from jobs.checkpoint.rank_group import RankGroup
from jobs.metrics.utilization import GroupCompute
from jobs.recipe.cost import RecipeCost, steps_by_size
from jobs.recipe.recipe import Recipe
from model.device_peak import DevicePeak, device_peak

logger = logging.getLogger(__name__)


def group_compute(recipe: Recipe, group: RankGroup, steps_per_epoch: int) -> GroupCompute:
    """What a group computes and could compute, for its attempt's event. Collective; takes up to a second on CPUs.

    Args:
        recipe: Of the run, with the classes of a fine-tuning.
        group: All ranks, each of which looks at its own device.
        steps_per_epoch: Global batches in an epoch.
    """
    peaks = group.gathered(_own_peak(recipe, torch.device(group.device)))
    known = [peak.flops_per_second for peak in peaks if peak]
    batch = recipe.global_batch_size
    changing: tuple[tuple[int, float], ...] = ()
    if recipe.resolution_schedule:
        parts = steps_by_size(recipe, steps_per_epoch, recipe.epochs * steps_per_epoch)
        changing = tuple((each.steps.start + 1, round(each.cost.training_flops * batch)) for each in parts)
    return GroupCompute(
        step_flops=round(RecipeCost.of(recipe).training_flops * batch),
        step_flops_from=changing,
        peak_flops_per_second=sum(known) if len(known) == len(peaks) else None,
        devices=devices_text(peaks),
    )


def devices_text(peaks: Sequence[DevicePeak | None]) -> str:
    """How many devices of which kind, and whether their peak is measured."""
    names = Counter(
        f"{peak.name} ({'measured' if peak.is_measured else 'data sheet'})" if peak else "device of unknown peak"
        for peak in peaks
    )
    return "; ".join(f"{count} x {name}" for name, count in names.items())


def _own_peak(recipe: Recipe, device: torch.device) -> DevicePeak | None:
    try:
        return device_peak(device, torch.float32 if recipe.precision == "fp32" else torch.bfloat16)
    except RuntimeError as error:  # too little memory, or a product that this device does not have: no run ends for it
        logger.warning("the peak of %s could not be measured: %s", device, error)
        return None
