"""Estimate of how long a step takes on GPUs that have not been measured, from the recipe and data sheets.

The same arithmetic as the table of docs/cluster.md, where each assumption is explained.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.recipe.cost import RecipeCost
from jobs.recipe.recipe import Recipe
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


def estimated_step_seconds(recipe: Recipe, node: NodeType, nodes: int) -> float:
    """Compute, then all-reduce of one step; they are assumed not to overlap.

    Args:
        recipe: Gives the model and the global batch.
        node: The kind of each node.
        nodes: How many there are.
    """
    gpus = nodes * node.gpus
    cost = RecipeCost.of(recipe)
    images = recipe.global_batch_size / gpus
    compute = images * cost.training_flops / (node.flops_per_second * node.reached)
    link = node.bytes_per_second_inside if nodes == 1 else node.bytes_per_second_between
    reduce = 2 * cost.parameters.trainable * GRADIENT_BYTES[recipe.precision] * (gpus - 1) / gpus / link
    return compute + reduce
