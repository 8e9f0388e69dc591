"""The engine of one rank, with the state of a checkpoint or the weights that a run begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.zero_state import ZeroState, owned_ranges, restore_optimizer
from jobs.recipe.recipe import Recipe
from jobs.step.engine import optimizer_groups
from jobs.step.training_step import RankPlace, build_rank_engine
from jobs.weights.initial import load_initial_weights, load_pretrained_encoder
from model import Classifier, ConvMAE
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage

if TYPE_CHECKING:
    import deepspeed


def values_of_rank(model: nn.Module, recipe: Recipe, place: RankPlace) -> dict[str, range]:
    """Of each trained parameter, the values that a rank updates, and whose moments it needs."""
    groups = optimizer_groups(model, recipe)
    return owned_ranges(model, groups, stage=recipe.zero_stage, rank=place.rank, world_size=place.world_size)


def restored_engine(
    model: ConvMAE | Classifier,
    state: ZeroState | None,
    *,
    recipe: Recipe,
    order: Order,
    place: RankPlace,
    storage: Storage,
) -> deepspeed.DeepSpeedEngine:
    """Put a model into an engine that continues from a state. Collective.

    Args:
        model: Freshly initialised.
        state: Of the checkpoint, with the moments of `values_of_rank`; None at the beginning of a run.
        recipe: Of the run; names the weights to begin with, if any.
        order: Of the run's samples.
        place: Of this rank.
        storage: Reaches these weights.
    """
    if state:
        model.load_state_dict(state.weights, strict=True)
    elif recipe.init_from:
        group = RankGroup(place.rank, place.world_size, place.device)
        if isinstance(model, Classifier):
            model.load_pretrained(*load_pretrained_encoder(storage, recipe, group))
        else:
            model.load_state_dict(load_initial_weights(storage, recipe, group), strict=True)
    engine = build_rank_engine(model.to(place.device), recipe, order, place)
    if state:
        restore_optimizer(engine, state)
    return engine
