"""A run's recipe, changed while it is live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.errors import RunError
from jobs.recipe.overrides import parse_overrides
from jobs.recipe.placement import LIVE_FIELDS, PLACEMENT_FIELDS
from jobs.recipe.recipe import Recipe, difference
from jobs.run.directory import RunDirectory


def changed_live(run: RunDirectory, changes: Sequence[str], word: str) -> dict[str, tuple[Any, Any]]:
    """Write a live run's recipe with fields changed; returns the values before and after of those that are others.

    Args:
        run: The run.
        changes: FIELD=VALUE, each.
        word: What the user calls the run.

    Raises:
        RecipeError: A field or a value is unknown, or they do not go together.
        RunError: A field that cannot be changed while the run is live.
    """
    given = parse_overrides(changes)

    def changed(recipe: Recipe) -> Recipe:
        after = recipe.amended(given)
        for name, value in given.items():
            _check_live(name, value, word, changes)
        if not after.micro_batch_size:
            rule, remedy = "must be a number in a run that has begun", "`auto` is found before a run's first step"
            raise RunError("micro_batch_size", rule, "auto", remedy)
        if differences := difference(recipe.trajectory(), after.trajectory()):
            rule = f"would change what the run computes ({'; '.join(differences)})"
            raise RunError("run", rule, ", ".join(changes), "set grain_size in a new run, or leave it")
        return after

    before, after = run.change_recipe(changed)
    old, new = before.to_json(), after.to_json()
    return {name: (old[name], new[name]) for name in sorted(given) if old[name] != new[name]}


def _check_live(name: str, value: Any, word: str, changes: Sequence[str]) -> None:
    if name in LIVE_FIELDS:
        return
    if name in PLACEMENT_FIELDS:
        remedy = f"`convmae stop {word}`, then `convmae resume {word} {' '.join(changes)}`: no step is lost"
        raise RunError(name, "must stay as it is while the run's driver lives", value, remedy)
    remedy = "begin another run with it: --run NAME"
    raise RunError(name, "must stay as it is for the life of a run, since it decides what is computed", value, remedy)
