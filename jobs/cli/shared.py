"""Parameters that several commands share, and how commands get their session, recipe and run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from jobs.cli.completion import run_names

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a .toml file that amends one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FIELD=VALUE]...", help="Fields to change: epochs=400 model.mask_ratio=0.6"),
]
RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Name of a run, or the path or URL of its directory.", autocompletion=run_names),
]
RunRoot = Annotated[
    str,
    typer.Option(
        "--run-root",
        help="URL or path that holds the runs; default: $CONVMAE_RUN_ROOT, else the local stack's, else the last used.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_session(*, verbose: bool = False) -> Any:
    """The session that the environment describes; exports its variables to this process.

    Args:
        verbose: Show what workers print, whatever the environment says.
    """
    from jobs.cluster.session import VERBOSE_VARIABLE, Session

    session = Session.open({**os.environ, VERBOSE_VARIABLE: "1"} if verbose else os.environ)
    session.export()
    return session


def amended_recipe(name: str, overrides: Iterable[str] | None, *, strict: bool = False) -> Any:
    """A recipe by name or file, with FIELD=VALUE amendments."""
    from jobs.recipe.named_recipes import named_recipe

    return amended(named_recipe(name), overrides, strict=strict)


def amended(recipe: Any, overrides: Iterable[str] | None, *, strict: bool = False) -> Any:
    """A recipe with FIELD=VALUE amendments."""
    from jobs.recipe.overrides import parse_overrides

    changes = [*(overrides or ()), *(["on_damaged_checkpoint=fail"] if strict else [])]
    return recipe.amended(parse_overrides(changes))


def existing_run(session: Any, name: str, run_root: str) -> Any:
    """The run's directory.

    Raises:
        RunError: If there is none; names the existing run with the closest name.
    """
    from jobs.run.directory import list_runs, unknown_run

    directory = session.run(name, run_root)
    root = directory.root
    session.storage.check(root, write=False)
    session.remember_run_root(root)
    if not directory.exists():
        raise unknown_run(directory, [known.name for known in list_runs(session.storage, root)])
    return directory
