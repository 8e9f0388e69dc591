"""Estimate of how long a step takes on GPUs that have not been measured, from the recipe and data sheets.

The same arithmetic as the table of docs/cluster.md, where each assumption is explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jobs.recipe.cost import RecipeCost, steps_by_size
from jobs.recipe.recipe import Recipe
from jobs.recipe.resolution import Resolution
from model.device_peak import SHEET_TFLOPS

GRADIENT_BYTES = {"fp32": 4, "bf16": 4, "bf16_pure": 2}
"""Of one gradient as it is sent, by precision."""


@dataclass(frozen=True)
class NodeType:
    """GPUs of one kind, and the links between them."""

    gpus: int
    flops_per_second: float
    """Of one GPU: dense, in bf16, by its data sheet."""
    reached: float = 0.2
    """The share of it that training reaches."""
    bytes_per_second_inside: float = 225e9
    """Half the bandwidth of a GPU's links to the others of its node."""
    bytes_per_second_between: float = 200e9
    """Half the total bandwidth of a node's links to other nodes; NCCL runs a ring over each. Default: EFA of a p5."""


H100_FLOPS_PER_SECOND = SHEET_TFLOPS["H100"][1] * 1e12


class TimedSteps(NamedTuple):
    """Steps of a run with images of one size, and what each takes."""

    resolution: Resolution
    steps: int
    step_seconds: float


def timed_steps(
    recipe: Recipe, node: NodeType, nodes: int, *, steps_per_epoch: int, total_steps: int, measured: float | None = None
) -> list[TimedSteps]:
    """A run's steps by the size of their images, in order.

    Args:
        recipe: Gives the model, the sizes and the global batch.
        node: The kind of each node.
        nodes: How many there are.
        steps_per_epoch: Global batches in an epoch.
        total_steps: Of the run.
        measured: Seconds of a step with images of `model.image_size`; those of other sizes take as much less as is
            estimated. None: all are estimated.
    """
    whole, timed = estimated_step_seconds(recipe, node, nodes), []
    for each in steps_by_size(recipe, steps_per_epoch, total_steps):
        estimated = estimated_step_seconds(recipe, node, nodes, each.resolution)
        seconds = estimated if measured is None else measured * (estimated / whole)
        timed.append(TimedSteps(each.resolution, len(each.steps), seconds))
    return timed


def mean_step_seconds(timed: Sequence[TimedSteps]) -> float:
    """Of all steps of a run."""
    steps = sum(each.steps for each in timed)
    return sum(each.steps / steps * each.step_seconds for each in timed)


def estimated_step_seconds(recipe: Recipe, node: NodeType, nodes: int, resolution: Resolution | None = None) -> float:
    """Compute, then all-reduce of one step; they are assumed not to overlap.

    Args:
        recipe: Gives the model and the global batch.
        node: The kind of each node.
        nodes: How many there are.
        resolution: One of the recipe's sizes of images; None: that of its model.
    """
    gpus = nodes * node.gpus
    cost = RecipeCost.of(recipe, resolution=resolution)
    images = recipe.global_batch_size / gpus
    compute = images * cost.training_flops / (node.flops_per_second * node.reached)
    link = node.bytes_per_second_inside if nodes == 1 else node.bytes_per_second_between
    reduce = 2 * cost.parameters.trainable * GRADIENT_BYTES[recipe.precision] * (gpus - 1) / gpus / link
    return compute + reduce
