"""The micro-batch of a run that leaves it to be found: by a task on a node that could have a rank."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.control.run_plan import RunPlan
from jobs.errors import RecipeError
from jobs.rank.micro_batch import Fitting, largest_micro_batch
from jobs.rank.standby import rank_environment
from jobs.recipe.recipe import Recipe
from jobs.terminal import bytes_text, say


def with_micro_batch(plan: RunPlan) -> RunPlan:
    """The plan, with a micro-batch that fits. Connected to the cluster; waits for a node with room for a rank.

    Raises:
        RecipeError: Not even one image fits.
    """
    recipe = plan.recipe
    if recipe.micro_batch_size:
        return plan
    say("finding the largest micro-batch that fits, on a worker")
    found = _asked(recipe)
    tried = ", ".join(f"{trial.images} take {bytes_text(trial.bytes)}" for trial in found.trials)
    say(f"micro_batch_size = {found.images}: of {bytes_text(found.limit_bytes)} for images, {tried}")
    return dataclasses.replace(plan, recipe=recipe.amended({"micro_batch_size": found.images}))


def _asked(recipe: Recipe) -> Fitting:
    import ray
    from ray.exceptions import RayTaskError

    on_gpu = recipe.device == "cuda"
    environment = rank_environment({}, recipe.device, recipe.cpus_per_worker, standby=False)
    task: Any = ray.remote(_found_here).options(
        num_cpus=recipe.cpus_per_worker, num_gpus=1 if on_gpu else 0, max_retries=0,
        runtime_env={"env_vars": environment},
    )  # fmt: skip
    try:
        found: Fitting = ray.get(task.remote(recipe.to_json()))
    except RayTaskError as error:
        if isinstance(error.cause, RecipeError):
            raise error.cause from None
        raise
    return found


def _found_here(fields: dict[str, Any]) -> Fitting:
    """Runs on a node of ranks, which are as many there as its CPUs allow."""
    import os

    recipe = Recipe.from_json(fields)
    ranks_here = max(1, min(recipe.max_workers, int((os.cpu_count() or 1) // recipe.cpus_per_worker)))
    return largest_micro_batch(recipe, ranks_here)
