"""Fine-tuning as part of an evaluation: an ordinary run, which the same evaluation finds again, and resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, TextIO

from jobs.cluster import submission
from jobs.cluster.session import Session
from jobs.control.lease import claim_run, is_live
from jobs.control.run_plan import RunPlan, plan_run
from jobs.control.workflow import follow_job
from jobs.errors import EvaluationError, RunFailedError
from jobs.evaluate.evaluation import SamplePlan
from jobs.recipe.named_recipes import named_recipe, recipe_names
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.run.evaluations import key_of
from jobs.weights.weight_files import model_json
from model import ConvMAEConfig

MOST_STEM = 40
"""Characters of the name of what is evaluated that are part of the run's name."""
_ARCHITECTURE = ("embed_dim", "depth", "num_heads", "mlp_ratio")


def finetuning_recipe(name: str, model: ConvMAEConfig, plan: SamplePlan, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of a fine-tuning on the samples of an evaluation, which is measured on its test samples.

    Args:
        name: Of a recipe of a fine-tuning; empty: the one for models of this architecture.
        model: Of the weights, which the recipe gets.
        plan: Which samples.
        changes: To the recipe, as typed.

    Raises:
        UserError: There is no such recipe, or it does not fit.
    """
    recipe = named_recipe(name or _name_for(model))
    if recipe.finetune is None:
        remedy = f"give one of {', '.join(_finetunings())}, or a .toml that amends one"
        raise EvaluationError("--finetune-recipe", "must be of a fine-tuning", recipe.name, remedy)
    if plan.most_samples:
        remedy = "leave out --samples; finetune.label_fraction=0.05 trains with a share of the labels"
        raise EvaluationError("--samples", "must not be given with --finetune", plan.most_samples, remedy)
    if plan.train_data:
        samples = {
            "data": plan.train_data,
            "finetune.labels": plan.train_labels,
            "finetune.validation_data": plan.data,
            "finetune.validation_labels": plan.labels,
            "finetune.validation_ratio": 0.0,
        }
    else:
        samples = {"data": plan.data, "finetune.labels": plan.labels, "finetune.validation_ratio": plan.test_ratio}
    fields = {f"model.{field}": value for field, value in json.loads(model_json(model)).items()}
    typed = {name: value for name, value in changes.items() if name not in samples}
    return recipe.amended({**fields, **samples, "finetune.split_seed": plan.seed, **typed})


def planned_finetuning(session: Session, recipe: Recipe, what: str) -> RunPlan:
    """The run of a fine-tuning whose every input was found good, on a cluster that answers.

    Args:
        session: Says which cluster.
        recipe: With the weights that it starts from.
        what: Is evaluated, for the run's name.

    Raises:
        UserError: An input is not good, or there is no cluster.
    """
    submission.job_client(session)
    return plan_run(session, recipe, _run_name(recipe, what), drives=False)


def finetuned(session: Session, plan: RunPlan, stream: TextIO) -> RunDirectory:
    """The finished run of a fine-tuning; it is submitted, resumed or followed until it is.

    Args:
        session: Says which cluster.
        plan: As planned.
        stream: Where progress is shown.

    Raises:
        RunFailedError: It ended before it was finished.
    """
    run, job = plan.run, ""
    if run.exists() and is_live(run):
        job = submission.newest_job(session, run)
    elif claim_run(plan) != "finished":
        job = submission.submit(session, run)
    if job:
        stream.write(f"fine-tuning: {run.url}\n")
        now = follow_job(session, run, job, stream)
        if now["state"] != "finished":
            counts = f"{now['state']} at step {now['step']} of {now['total_steps']}"
            raise RunFailedError(f"{run.name}: {counts}; the same command resumes it")
    return run


def _finetunings() -> list[str]:
    recipes = (named_recipe(name) for name in recipe_names())
    return [recipe.name for recipe in recipes if recipe.finetune and recipe.finetune.kind == "full"]


def _name_for(model: ConvMAEConfig) -> str:
    """Of the recipe that fine-tunes models of this architecture."""
    names = _finetunings()
    for name in names:
        theirs = named_recipe(name).model
        if all(getattr(theirs, field) == getattr(model, field) for field in _ARCHITECTURE):
            return name
    remedy = f"there are {', '.join(names)}; or give a .toml that amends one"
    raise EvaluationError("--finetune-recipe", "must be given for weights of this architecture", model.depth, remedy)


def _run_name(recipe: Recipe, what: str) -> str:
    """It follows from what is trained, with what, from which weights."""
    stem = "".join(letter if letter.isalnum() else "-" for letter in PurePosixPath(what).name.lower())
    stem = stem.encode("ascii", "ignore").decode().strip("-")[:MOST_STEM] or "weights"
    decisive = {"trajectory": recipe.trajectory(), "data": recipe.data, "init_from": recipe.init_from}
    return f"{stem}-finetune-{key_of(decisive)[:8]}"
