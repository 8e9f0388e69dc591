"""Weights as users name them: a run, RUN@STEP, a file, or `random`; and as `init_from` of a fine-tuning's recipe."""

from __future__ import annotations

import re
from collections.abc import Callable

from jobs.consolidation.consolidate import consolidate
from jobs.errors import EvaluationError, RecipeError
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.weights import consolidated
from pipeline.access.places import is_place, normal
from pipeline.store.storage import Storage

RANDOM = "random"
"""In place of weights: those that nothing has trained."""
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_STEP = re.compile(r"(.+)@([0-9]{1,12})")


def is_file(storage: Storage, what: str) -> bool:
    """Whether weights are meant by a file, or a folder of consolidated ones, rather than by a run.

    Args:
        storage: Reaches it.
        what: As it was given; a bare word without a suffix of weights is a run.
    """
    if what.endswith(TORCH_SUFFIXES) or consolidated.is_weights(storage, normal(what) if is_place(what) else what):
        return True
    return is_place(what) and storage.exists(normal(what))


def parted(what: str, step: int | None = None) -> tuple[str, int | None]:
    """A run and a step out of RUN@STEP, or what else was given.

    Raises:
        EvaluationError: A step is given twice.
    """
    match = _STEP.fullmatch(what)
    if match is None:
        return what, step
    if step is not None:
        raise EvaluationError("--step", "must not be given with RUN@STEP", step, "give one of the two")
    return match[1], int(match[2])


def check_is_finetuning(recipe: Recipe) -> None:
    """Refuse the recipe of a pretraining.

    Raises:
        RecipeError: It is one.
    """
    if recipe.finetune is None:
        remedy = "take convmae_base_finetune, convmae_base_linear, tiny_finetune, tiny_linear, or a .toml of one"
        raise RecipeError("RECIPE", "must be of a fine-tuning", recipe.name, remedy)


def resolved_weights(
    storage: Storage, recipe: Recipe, what: str, run_of: Callable[[str], RunDirectory]
) -> dict[str, str]:
    """The fields of a recipe that name the weights; those of a run are consolidated where they are not.

    Args:
        storage: Reaches files.
        recipe: Of a fine-tuning.
        what: A run, RUN@STEP, a file, or `random`; empty: what the recipe says.
        run_of: The directory of a run that exists.

    Raises:
        UserError: There are no such weights, or none were named.
    """
    if not what:
        if recipe.init_from:
            return {}
        remedy = "give --from RUN, or --from random for weights that nothing has trained"
        raise RecipeError("--from", "must name the weights to start from", "", remedy)
    if recipe.init_from and recipe.init_from != what:
        raise RecipeError("--from", "must not be given with init_from", what, "give one of the two")
    if what == RANDOM:
        return {}
    if is_file(storage, what):
        return {"init_from": normal(what)}
    run, step = parted(what)
    return {"init_from": consolidate(run_of(run), step).url}
