"""Recipes as people type them, on the command line and into files."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fuzzing import Fuzz, reading_only
from hypothesis import strategies as st
from mutations import ODD_TEXTS, damaged, json_values, scalars, texts, toml

from jobs.recipe.named_recipes import named_recipe, recipe_names
from jobs.recipe.overrides import parse_overrides
from jobs.recipe.plan import IMAGENET, recipe_json, recipe_lines
from jobs.recipe.recipe import Recipe
from jobs.terminal import MOST_BYTES, parsed_bytes
from model import ConvMAEConfig

Draw = Callable[[st.SearchStrategy[Any]], Any]

FIELDS = sorted(
    {*Recipe.model_fields, *(f"model.{field.name}" for field in dataclasses.fields(ConvMAEConfig)), "model.preset"}
)
TINY = {key: value for key, value in named_recipe("tiny").to_json().items() if key != "model"}
MODEL = {f"model.{key}": value for key, value in named_recipe("tiny").to_json()["model"].items()}


near_numbers = st.one_of(st.integers(-2, 5000), st.sampled_from((1, 2, 4, 8, 16, 32, 64, 224, 448)), st.floats(0, 2))
values = st.one_of(
    near_numbers.map(toml),
    json_values.map(toml),
    scalars.map(str),
    texts,
    st.sampled_from(("0x10", "1_0", "1e9", "1979-05-27", "'a'")),
)
keys = st.one_of(
    st.sampled_from(FIELDS), st.sampled_from(FIELDS), texts, st.sampled_from(("model", "model.", "model.model.loss"))
)


@st.composite
def arguments(draw: Draw) -> list[str]:
    """Some `field=value`, most of them of fields that there are."""
    chosen = draw(st.lists(st.tuples(keys, values), max_size=4))
    return [draw(st.sampled_from((f"{key}={value}", f"{key}={value}", f"{key}={value}", key))) for key, value in chosen]


def check_recipe(recipe: Recipe) -> None:
    """A recipe is what it says of itself, and can be looked at."""
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    for _, text in recipe_lines(recipe, IMAGENET):
        assert isinstance(text, str)
    assert json.loads(json.dumps(recipe_json(recipe, IMAGENET)))["recipe"] == json.loads(json.dumps(recipe.to_json()))


def test_arguments_make_a_recipe_or_are_refused(fuzz: Fuzz) -> None:
    def recipe_arguments(given: tuple[str, Sequence[str]]) -> None:
        name, arguments = given
        overrides = parse_overrides(arguments)
        for argument in arguments:
            key, _, text = argument.partition("=")
            try:
                expected = tomllib.loads(f"value = {text}")["value"]
            except (ValueError, RecursionError):
                expected = text
            assert repr(overrides[key]) == repr(expected)
        check_recipe(named_recipe(name).amended(overrides))

    fuzz(recipe_arguments, st.tuples(st.sampled_from(recipe_names()), arguments()), batch=40)


@st.composite
def files(draw: Draw) -> bytes:
    """A recipe's file: lines of fields, tables, and what editors add."""
    fields = {"base": draw(st.sampled_from(("tiny", "convmae_base", "nope", 5)))}
    whole = draw(st.booleans())
    given = {**TINY, **MODEL} if whole else {}
    given |= draw(st.dictionaries(st.sampled_from(FIELDS), st.one_of(near_numbers, json_values), max_size=4))
    top = {key: value for key, value in given.items() if not key.startswith("model.")}
    lines = [f"{key} = {toml(value)}" for key, value in {**fields, **top}.items()]
    lines += [
        "[model]",
        *(f"{key.removeprefix('model.')} = {toml(value)}" for key, value in given.items() if key.startswith("model.")),
    ]
    lines += draw(
        st.lists(st.sampled_from(("", "# a comment", "[model]", "[[x]]", "a.b.c = 1", *ODD_TEXTS)), max_size=2)
    )
    end = draw(st.sampled_from(("\n", "\r\n")))
    text = end.join([*lines, ""]).encode("utf-8", "surrogatepass")
    start = draw(st.sampled_from((b"", b"", b"\xef\xbb\xbf")))
    return start + (draw(damaged(text)) if draw(st.booleans()) else text)


def test_a_file_makes_a_recipe_or_is_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    def recipe_files(data: bytes) -> None:
        place = tmp_path / "mine.toml"
        place.write_bytes(data)
        with reading_only(tmp_path):
            recipe = named_recipe(str(place))
        check_recipe(recipe)

    fuzz(recipe_files, files(), batch=30)


sizes = st.one_of(
    texts,
    st.tuples(
        st.sampled_from(("", " ", "1", "1.5", "0", "-1", "1e9", "\u0663", "9" * 30, "9" * 400, "1_0")),
        st.sampled_from(("", " ")),
        st.sampled_from(("", "B", "k", "kB", "KiB", "MB", "GiB", "T", "TiB", "PB", "iB", "x")),
    ).map("".join),
)


def test_a_number_of_bytes_is_one_or_is_refused(fuzz: Fuzz) -> None:
    units = {"": 1, "k": 1000, "K": 1000, "M": 10**6, "G": 10**9, "T": 10**12}

    def byte_counts(text: str) -> None:
        count = parsed_bytes("--shard-bytes", text)
        assert type(count) is int and 0 <= count <= MOST_BYTES
        unit = text.strip().removesuffix("B").removesuffix("i")[-1:].strip()
        if "i" not in text and not unit.isdecimal() and "." not in text:
            assert count == int(text.strip().removesuffix("B").removesuffix(unit)) * units[unit]

    fuzz(byte_counts, sizes, batch=150)
