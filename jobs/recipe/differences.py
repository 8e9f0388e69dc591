"""Fields of recipes side by side: which differ, what they decide, and which values are defaults."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jobs.recipe import finetune
from jobs.recipe.finetune import Finetune
from jobs.recipe.placement import PLACEMENT_FIELDS
from jobs.recipe.recipe import Recipe
from model import ConvMAEConfig


def recipe_fields(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every field with its value as in JSON; those of parts as `model.<field>`. A part that it lacks is one field."""
    for name, value in recipe.to_json().items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield name, value


def differing_fields(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """The values of every field in which recipes differ; None in those that lack it."""
    flat = [dict(recipe_fields(recipe)) for recipe in recipes]
    fields = {name: [values.get(name) for values in flat] for name in dict.fromkeys(itertools.chain(*flat))}
    return {name: values for name, values in fields.items() if any(value != values[0] for value in values)}


def is_default(field: str, value: Any) -> bool:
    """Whether a value is the one that the field has where nobody gives another.

    Args:
        field: As `recipe_fields` names it.
        value: As in JSON.
    """
    part, dot, name = field.partition(".")
    if dot and part == "model":
        default: Any = dataclasses.asdict(ConvMAEConfig())[name]
    else:
        known = Finetune.model_fields[name] if dot else Recipe.model_fields[field]
        if known.is_required():
            return False
        default = known.default
    return bool(value == (list(default) if isinstance(default, tuple) else default))


def is_placement(field: str) -> bool:
    """Whether a field says where and how a run executes, not what it computes."""
    part, dot, name = field.partition(".")
    return name in finetune.PLACEMENT_FIELDS if dot and part == "finetune" else field in PLACEMENT_FIELDS
