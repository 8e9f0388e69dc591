"""Fields of a recipe as they are typed: `field=value`, with TOML's values."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from jobs.errors import RecipeError
from pipeline.errors import clipped

LONGEST_ARGUMENT = 4096
"""Characters of a `field=value`."""


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `field=value` arguments.

    Raises:
        RecipeError: For an argument without `=` or of absurd length, or a key given twice.
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key.strip():
            raise RecipeError("argument", "must be field=value", clipped(argument), "write, for example, epochs=400")
        if len(argument) > LONGEST_ARGUMENT:
            rule = f"must be at most {LONGEST_ARGUMENT} characters"
            raise RecipeError(key[:40], rule, f"{text[:40]}...", "put it into a .toml file, or correct it")
        if key in overrides:
            raise RecipeError(key, "must be given once", f"{key}=...", "drop one of the two")
        overrides[key] = _toml_value(text)
    return overrides


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, or too deep, or a number with too many digits
        return text
