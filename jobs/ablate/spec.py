"""The spec of an ablation: recipes that differ in what is studied, seeds, an evaluation, and what others have found.

A spec is a TOML file. `base` and `[recipe]` are common to all variants; `[grid]` makes a variant of each combination of
its values, and each `[[variants]]` is one by name, whose other keys are fields of the recipe.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from jobs.errors import AblationError, RecipeError
from jobs.recipe.named_recipes import file_fields, named_recipe
from jobs.recipe.overrides import parse_overrides
from jobs.recipe.recipe import MOST, Recipe
from jobs.run.directory import RUN_NAME
from pipeline.access.places import normal

SPECS = Path(__file__).parent / "specs"
"""The specs that come with the package."""
EVALUATION = "evaluation."
"""Prefix of the evaluation's fields on the command line."""
PLACES = ("data", "train_data", "labels", "train_labels")
"""Fields of the evaluation that are paths or URLs."""
MOST_TRIALS = 10_000
"""More runs are a typing error."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EvaluationPart(_Part):
    """How each run is measured when it has finished: as `convmae evaluate` measures."""

    kind: Literal["probe"] = "probe"
    """kNN and a linear probe on frozen features."""
    data: str = ""
    """URL of the dataset to test on; empty: that of the run."""
    train_data: str = ""
    """URL of a dataset to learn from; empty: `data` is divided."""
    labels: str = ""
    """URL of a list of labels for `data`; empty: its own."""
    train_labels: str = ""
    """The same for `train_data`."""
    k: tuple[int, ...] = (20,)
    """Neighbours of each kNN; empty: none."""
    linear: bool = True
    """Whether there is a linear probe."""
    l2: float = Field(default=1.0, gt=0)
    """Of the linear probe."""
    test_ratio: float = Field(default=0.2, gt=0, lt=1)
    """Share of `data` to test on where it is divided."""
    samples: int = Field(default=0, ge=0)
    """Most samples of each dataset; 0: all."""
    split_seed: int = Field(default=0, ge=0)
    """Of the division, and of the choice of `samples`."""
    image_size: str = ""
    """Size of the images; empty: that of the pretraining."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where features are computed."""

    @field_validator(*PLACES)
    @classmethod
    def _place(cls, url: str) -> str:
        return normal(url) if url else ""

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if not (self.k or self.linear):
            raise AblationError("evaluation", "must measure something", "k = [], linear = false", "set linear = true")
        return self


class PaperFigure(_Part):
    """A figure that others have published of a variant."""

    variant: str
    measure: str
    """What was measured; figures of one measure are one column."""
    value: float
    """In percent."""
    source: str
    """Where it stands."""


class Statement(_Part):
    """What others have found, as an order of variants that can be compared with ours."""

    text: str
    source: str
    rising: tuple[str, ...] = ()
    """Variants from the worst to the best."""
    similar: tuple[str, ...] = ()
    """Variants that do not differ by more than `within`."""
    within: float = Field(default=1.0, gt=0)
    """Percentage points."""

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if bool(self.rising) == bool(self.similar) or len(self.variants) < 2:
            rule = "must have either `rising` or `similar`, with at least two variants"
            raise AblationError("statements", rule, self.text, "name the variants that it is about")
        return self

    @property
    def variants(self) -> tuple[str, ...]:
        """Those that it is about."""
        return self.rising or self.similar


class VariantPart(BaseModel):
    """One variant by name; its other keys are fields of the recipe."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str
    base: str = ""
    """A recipe other than the spec's."""


class SpecFile(_Part):
    """A spec as it is written."""

    name: str
    """Of the ablation; its runs are called `<name>-<variant>-seed<k>`."""
    title: str = ""
    """For people."""
    base: str
    """A recipe, or a .toml file beside the spec that amends one."""
    recipe: dict[str, Any] = {}
    """Fields that all variants change."""
    grid: dict[str, Any] = {}
    """Lists of values by field."""
    variants: tuple[VariantPart, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained once with each."""
    images: int = Field(default=0, ge=0, le=MOST)
    """Of the data set that it is meant for, by which costs are estimated where none is named; 0: as ImageNet-1k has."""
    evaluation: EvaluationPart = EvaluationPart()
    paper: tuple[PaperFigure, ...] = ()
    statements: tuple[Statement, ...] = ()

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise AblationError("seeds", "must be distinct, and at least one", list(seeds), "write seeds = [0, 1, 2]")
        return seeds


@dataclass(frozen=True)
class Variant:
    """Recipes that differ in their seed alone."""

    name: str
    base: str
    """Name of the recipe that it amends."""
    changes: Mapping[str, Any]
    """What sets it apart from other variants, by field."""
    recipe: Recipe


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of an ablation."""

    variant: Variant
    seed: int
    recipe: Recipe
    run_name: str


@dataclass(frozen=True)
class Spec:
    """An ablation whose every recipe was found valid; nothing was looked up or started yet."""

    file: SpecFile
    variants: tuple[Variant, ...]
    trials: tuple[Trial, ...]
    """By variant, then seed."""

    @property
    def name(self) -> str:
        """Of the ablation."""
        return self.file.name

    @classmethod
    def load(cls, word: str, overrides: Sequence[str] = ()) -> Spec:
        """Read a spec and apply what was typed after it.

        Args:
            word: Name of a shipped spec, or path of a .toml file.
            overrides: `field=value` of the recipes, `evaluation.field=value`, `seeds=[...]`.

        Raises:
            AblationError: There is no such spec, or it has a fault; names key and remedy.
            RecipeError: A variant's recipe cannot be trained.
        """
        path = spec_path(word)
        fields = {"name": path.stem, **file_fields(path)}
        typed = parse_overrides(overrides)
        file = _checked(fields, typed)
        _check_size(file)
        common = {name: value for name, value in typed.items() if name != "seeds" and not name.startswith(EVALUATION)}
        variants = tuple(_variants(file, path.parent, common))
        trials = tuple(_trials(file, variants))
        _check_names(file, variants, trials)
        return cls(file, variants, trials)


def spec_names() -> list[str]:
    """Names of the specs that come with the package."""
    return sorted(path.stem for path in SPECS.glob("*.toml") if "base" in file_fields(path) and _is_spec(path))


def spec_path(word: str) -> Path:
    """Where a spec lies.

    Raises:
        AblationError: There is none of that name; names the nearest.
    """
    if word.endswith(".toml"):
        return Path(word)
    names = spec_names()
    if word in names:
        return SPECS / f"{word}.toml"
    remedy = f"did you mean {near}?" if (near := _nearest(word, names)) else f"there are {', '.join(names)}"
    raise AblationError("spec", "must be the name of a spec or a .toml file", word, remedy)


def base_files(path: Path) -> Iterator[Path]:
    """The recipes in files that a spec amends."""
    fields = file_fields(path)
    parts = [fields, *(part for part in fields.get("variants", ()) if isinstance(part, dict))]
    names = (str(part.get("base", "")) for part in parts)
    yield from dict.fromkeys(path.parent / name for name in names if name.endswith(".toml"))


def _is_spec(path: Path) -> bool:
    return bool({"grid", "variants"} & file_fields(path).keys())


def _nearest(word: str, names: Sequence[str]) -> str:
    return next(iter(difflib.get_close_matches(word, names, n=1, cutoff=0.5)), "")


def _checked(fields: dict[str, Any], typed: Mapping[str, Any]) -> SpecFile:
    evaluation = fields.get("evaluation", {})
    if isinstance(evaluation, dict):
        own = {name.removeprefix(EVALUATION): value for name, value in typed.items() if name.startswith(EVALUATION)}
        fields = {**fields, "evaluation": {**evaluation, **own}}
    if "seeds" in typed:
        fields["seeds"] = typed["seeds"]
    for name in ("recipe", "grid"):
        if isinstance(fields.get(name), dict):
            fields[name] = _flat(fields[name])
    try:
        return SpecFile.model_validate(_tuples(fields))
    except ValidationError as error:
        raise _fault(error) from None


def _tuples(value: Any) -> Any:
    """Lists as tuples where a field is one; those of grids and recipes stay as they are."""
    if isinstance(value, dict):
        return {key: item if key in ("grid", "recipe") else _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the model by their dotted names, however TOML has nested them."""
    model = fields.get("model")
    if not isinstance(model, dict):
        return dict(fields)
    others = {name: value for name, value in fields.items() if name != "model"}
    return {**others, **{f"model.{name}": value for name, value in model.items()}}


def _fault(error: ValidationError) -> AblationError:
    """The first fault, with the nearest key for one that is unknown."""
    fault = error.errors()[0]
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, AblationError):
        return cause
    place = ".".join(str(part) if str(part).strip() else repr(part) for part in fault["loc"])
    if place == "evaluation.kind":
        remedy = "fine-tuning needs `convmae finetune` on the finished runs; leave the key out"
        return AblationError(place, "must be probe", fault["input"], remedy)
    if fault["type"] == "extra_forbidden":
        known = list(_fields_at(fault["loc"]))
        near = _nearest(str(fault["loc"][-1]), known)
        remedy = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
        return AblationError(place, "is not a key of a spec", fault["loc"][-1], remedy)
    rule = fault["msg"].replace("Input should", "should").replace("Field required", "is required")
    value = None if fault["type"] == "missing" else fault["input"]
    return AblationError(place, rule, value, "correct it in the spec")


def _fields_at(place: tuple[int | str, ...]) -> Sequence[str]:
    parts: dict[str, type[BaseModel]] = {"evaluation": EvaluationPart, "paper": PaperFigure, "statements": Statement}
    model = parts.get(str(place[0]), SpecFile) if len(place) > 1 else SpecFile
    return list(model.model_fields)


def _check_size(file: SpecFile) -> None:
    """Count the runs before any is made: a grid of a few lines can ask for millions."""
    combinations = math.prod(len(values) for values in file.grid.values() if isinstance(values, list))
    variants = (combinations if file.grid else 0) + len(file.variants)
    if (runs := max(1, variants) * len(file.seeds)) > MOST_TRIALS:
        rule = f"must ask for at most {MOST_TRIALS} runs"
        raise AblationError("spec", rule, runs, "vary fewer fields at once")


def _variants(file: SpecFile, folder: Path, typed: Mapping[str, Any]) -> Iterator[Variant]:
    """All variants: those of the grid, then those by name; without either the base alone."""
    parts = [(_grid_name(changes), "", changes) for changes in _combinations(file.grid)]
    parts += [(part.name, part.base, _flat(part.model_extra or {})) for part in file.variants]
    for name, base, changes in parts or [("base", "", {})]:
        for field in (*changes, "seed", "name"):
            if field in typed:
                remedy = "choose seeds by seeds=[0, 1]" if field == "seed" else "leave it out, or change the spec"
                raise AblationError(field, "must not be given: it is what the spec varies", typed[field], remedy)
        word = base or file.base
        try:
            recipe = named_recipe(str(folder / word) if word.endswith(".toml") else word)
            yield Variant(name, recipe.name, changes, recipe.amended({**file.recipe, **changes, **typed}))
        except RecipeError as error:
            raise RecipeError(f"{name}: {error.field}", error.rule, error.value, error.remedy) from None


def _combinations(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for field, values in grid.items():
        if not isinstance(values, list) or not values:
            raise AblationError(f"grid.{field}", "must be a list of values", values, f"write {field} = [a, b]")
    if grid:
        yield from (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def _grid_name(changes: Mapping[str, Any]) -> str:
    return "_".join(f"{field.rpartition('.')[2]}-{_value_name(value)}" for field, value in changes.items())


def _value_name(value: Any) -> str:
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _trials(file: SpecFile, variants: Sequence[Variant]) -> Iterator[Trial]:
    for variant in variants:
        for seed in file.seeds:
            recipe = variant.recipe.amended({"seed": seed})
            yield Trial(variant, seed, recipe, f"{file.name}-{variant.name}-seed{seed}")


def _check_names(file: SpecFile, variants: Sequence[Variant], trials: Sequence[Trial]) -> None:
    names = [variant.name for variant in variants]
    if double := next((name for name in names if names.count(name) > 1), ""):
        raise AblationError("variants", "must have names of their own", double, "rename one of them")
    for trial in trials:
        if not RUN_NAME.fullmatch(trial.run_name):
            rule = "must make names of runs of at most 63 lower-case letters, digits, '.', '_' or '-'"
            raise AblationError("name", rule, trial.run_name, "shorten the name of the spec or of the variant")
    mentioned = [
        *(figure.variant for figure in file.paper),
        *(name for one in file.statements for name in one.variants),
    ]
    for name in mentioned:
        if name not in names:
            near = _nearest(name, names)
            remedy = f"did you mean {near}?" if near else f"there are {', '.join(names)}"
            raise AblationError("paper, statements", "must be about variants of the spec", name, remedy)
