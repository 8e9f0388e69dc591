"""Commands that run on the cluster, as a job, because this machine cannot do their work: a laptop that is not a node.

A command that needs the cluster is sent there from every machine that is not one of its nodes. One that needs only the
store is sent there from a machine without credentials for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Context
from typer.core import TyperCommand

from pipeline.access.places import is_place, normal
from pipeline.access.urls import is_local, is_s3, with_known_scheme
from pipeline.errors import UserError

if TYPE_CHECKING:
    from jobs.cluster.session import Session

RECIPES = ("recipe", "target")
"""Parameters that name a recipe; the second may name a data set instead."""
EVALUATION_FIELDS = tuple(f"evaluation.{name}" for name in ("data", "train_data", "labels", "train_labels"))
"""Fields of an ablation's evaluation that are paths or URLs."""
RUNS = ("run", "other")
"""Parameters that name a run, by its name or its directory."""
WEIGHTS = ("what", "weights")
"""Parameters that name weights: a run, a file, or neither."""


@dataclass(frozen=True)
class Needs:
    """What a command needs in order to run where it is typed."""

    places: tuple[str, ...] = ()
    """Parameters that are paths or URLs."""
    cluster: bool = False
    """To connect to the cluster as a driver."""
    run: bool = False
    """To reach a run's directory."""


def at_cluster(*places: str) -> type[TyperCommand]:
    """The class of a command that starts tasks on the cluster.

    Args:
        places: Its parameters that are paths or URLs.
    """
    return _kind(Needs(places, cluster=True))


def at_store(*places: str) -> type[TyperCommand]:
    """The class of a command that works on data at some URLs, for which it needs no cluster.

    Args:
        places: Its parameters that are paths or URLs.
    """
    return _kind(Needs(places))


def at_run(*places: str) -> type[TyperCommand]:
    """The class of a command that works on a run's directory, for which it needs no cluster.

    Args:
        places: Its other parameters that are paths or URLs.
    """
    return _kind(Needs(places, run=True))


def _kind(needs: Needs) -> type[TyperCommand]:
    class Elsewhere(TyperCommand):
        """A command that first finds out where its work can be done."""

        def invoke(self, ctx: Any) -> Any:
            from jobs.cli.shared import open_session

            session = open_session()
            if _goes_there(session, ctx.params, needs):
                sys.exit(go_there(session, ctx, needs.places))
            return super().invoke(ctx)

    return Elsewhere


def _goes_there(session: Session, parameters: Mapping[str, Any], needs: Needs) -> bool:
    if session.is_local or session.is_in_job or "RAY_ADDRESS" not in session.environ:
        return False
    if needs.cluster:
        return session.is_away
    needs_credentials = any(is_s3(normal(url)) for url in _urls(session, parameters, needs))
    return needs_credentials and not session.has_credentials and session.is_away


def _urls(session: Session, parameters: Mapping[str, Any], needs: Needs) -> Iterator[str]:
    """The paths and URLs on which a command works.

    Raises:
        UserError: It works on a run, and no run root is known.
    """
    fields = dict(_url_fields(parameters))
    yield from (place for _, place in _places(parameters, needs.places))
    yield from fields.values()
    if needs.run:
        root = str(parameters.get("run_root") or fields.get("run_root", ""))
        names = [str(parameters[name]) for name in (*RUNS, "checkpoint") if parameters.get(name)]
        for name in names or [""]:
            yield name if is_place(name) or Path(name).is_file() else session.run_root(root)


def go_there(
    session: Session,
    ctx: Context,
    places: tuple[str, ...] = (),
    files: Mapping[str, str] | None = None,
    **changed: object,
) -> int:
    """Run a command on the cluster, with its parameters as they were understood; returns its exit code.

    Args:
        session: Names the cluster.
        ctx: The command's.
        places: Its parameters that are paths or URLs.
        files: Small files to send along, by name.
        changed: Parameters that have another value there.

    Raises:
        UserError: A path is on this machine's disk.
    """
    from jobs.recipe.recipe import check_notify_url
    from jobs.remote.command import run_there

    parameters, attached = {**ctx.params, **changed}, dict(files or {})
    for name in RECIPES:
        if _is_recipe(parameters.get(name)):
            parameters[name] = _attached_recipe(str(parameters[name]), parameters.get("overrides"), attached)
    if str(parameters.get("spec", "")).endswith(".toml"):
        parameters["spec"] = _attached_spec(str(parameters["spec"]), parameters.get("overrides"), attached)
    own = [(name, place) for name, place in _places(parameters, places) if not _is_recipe(ctx.params[name])]
    for field, place in [*own, *_url_fields(parameters)]:
        refuse_own_path(field, place)
    for field, place in _own_words(parameters):
        _refuse_unless_absolute(field, place)
    for override in parameters.get("overrides") or ():
        field, _, value = override.partition("=")
        if field == "notify_url":  # Ray's dashboard shows what a job is called with
            check_notify_url(value)
    given = str(parameters.get("run_root") or dict(_url_fields(parameters)).get("run_root", ""))
    code = run_there(session, arguments(ctx, parameters), files=attached, run_root=known_run_root(session, given))
    if given and code == 0:
        session.remember_run_root(session.run_root(given))
    return code


def _own_words(parameters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Values that may depend on the current folder or the home folder, besides those that `refuse_own_path` checks."""
    yield "--run-root", str(parameters.get("run_root") or "")
    for name in RUNS:
        run = str(parameters.get(name) or "")
        yield name, run if is_place(run) else ""
    for name in WEIGHTS:
        weights = str(parameters.get(name) or "")
        yield name, weights if is_place(weights) or Path(weights).is_file() else ""
    for override in parameters.get("overrides") or ():
        field, _, value = override.partition("=")
        if field == "cache_dir":
            yield field, value


def _places(parameters: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The paths and URLs that some parameters hold, one or several each; `-` is the terminal."""
    for name in names:
        value = parameters[name] or ()
        yield from ((name, str(place)) for place in ([value] if isinstance(value, str) else value) if place != "-")


def _refuse_unless_absolute(field: str, place: str) -> None:
    if place and not _is_absolute(place):
        remedy = "write a URL, or an absolute path that is the same on its nodes"
        raise UserError(field, "must mean the same on the cluster as here", place, remedy)


def _is_absolute(place: str) -> bool:
    """Whether a path or URL means the same in every folder and for every user."""
    return not is_local(normal(place)) or with_known_scheme(place).startswith(("/", "file:///"))


def refuse_own_path(field: str, place: str, remedy: str = "use s3://bucket/folder") -> None:
    """Refuse a path on this machine's disk; an absolute one that does not exist here may be the cluster's.

    Raises:
        UserError: It is relative, or it exists here.
    """
    found = normal(place) if place else ""
    if found and is_local(found) and (not _is_absolute(place) or Path(found).exists()):
        raise UserError(field, "must be a place that the cluster's nodes reach", place, remedy)


def arguments(ctx: Context, parameters: Mapping[str, Any]) -> list[str]:
    """The words with which one would type the command with these parameters."""
    words, positional = [str(ctx.info_name)], []
    for parameter in ctx.command.params:
        value = parameters[str(parameter.name)]
        if parameter.param_type_name == "argument":
            positional += list(value or ()) if parameter.nargs == -1 else [value] if value else []
        elif getattr(parameter, "is_flag", False):
            words += [parameter.opts[0]] if value else []
        elif value is not None and value != parameter.default:
            words += [f"{parameter.opts[0]}={item}" for item in (value if parameter.multiple else [value])]
    return [*words, "--", *map(str, positional)]


def _url_fields(parameters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields of a recipe that are URLs, as given by FIELD=VALUE."""
    from jobs.recipe.recipe import URL_FIELDS

    for override in parameters.get("overrides") or ():
        field, _, value = override.partition("=")
        if field in (*URL_FIELDS, *EVALUATION_FIELDS):
            yield field, value


def _is_recipe(value: object) -> bool:
    """Whether a parameter's value names a recipe, not a path or URL."""
    from jobs.recipe.named_recipes import recipe_names

    return str(value).endswith(".toml") or value in recipe_names()


def _attached_recipe(name: str, overrides: Iterable[str] | None, attached: dict[str, str]) -> str:
    """The recipe's name there; a file is sent along. One that cannot be read or trained is refused here.

    Raises:
        RecipeError: It is not a valid recipe.
    """
    from jobs.cli.shared import amended_recipe
    from jobs.recipe.named_recipes import file_fields
    from jobs.recipe.recipe import URL_FIELDS

    amended_recipe(name, overrides)
    if not name.endswith(".toml"):
        return name
    for field, value in file_fields(Path(name)).items():
        if field in (*URL_FIELDS, "cache_dir"):
            _refuse_unless_absolute(field, value)
    attached[Path(name).name] = Path(name).read_text("utf-8-sig")
    return Path(name).name


def _attached_spec(word: str, overrides: Iterable[str] | None, attached: dict[str, str]) -> str:
    """An ablation's spec there; its file is sent along with the recipes beside it. A fault is refused here.

    Raises:
        UserError: It is not valid, or a place in it means another one there.
    """
    from jobs.ablate.spec import PLACES, Spec, base_files
    from jobs.recipe.recipe import URL_FIELDS

    spec = Spec.load(word, list(overrides or ()))
    for name in PLACES:
        _refuse_unless_absolute(f"evaluation.{name}", str(getattr(spec.file.evaluation, name)))
    for field in (*URL_FIELDS, "cache_dir"):
        _refuse_unless_absolute(field, str(spec.file.recipe.get(field, "")))
    for path in (Path(word), *base_files(Path(word))):
        if path.parent != Path(word).parent:
            raise UserError("base", "must lie beside the spec to be sent along", str(path), "move it there")
        attached[path.name] = path.read_text("utf-8-sig")
    return Path(word).name


def known_run_root(session: Session, given: str = "") -> str:
    """The run root that a command works with; empty if none is known, since it may need none."""
    try:
        return session.run_root(given)
    except UserError:
        return ""
