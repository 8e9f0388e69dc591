"""Damage as hypothesis draws it: to bytes, to JSON documents, and text that people and machines put into names."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

ODD_TEXTS = (
    "",
    " ",
    ".",
    "..",
    "/",
    "//",
    "../../etc/passwd",
    "/etc/passwd",
    "~/x",
    "C:\\x",
    "a\0b",
    "a\nb",
    "a\rb",
    "\x1b[2J",
    "\u202egpj",
    "\u2028",
    "\x85",
    "\x0c",
    "\ufeff",
    "\ud800",
    "e\u0301",
    "\u6771\u4eac",
    "\U0001f642",
    "%2e%2e%2f",
    "a?b#c",
    "{1..9}",
    "*",
    "[/nope]",
    "<script>",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x",
    "s3://b//k",
    "-1",
    "1.0",
    "NaN",
    "None",
    "true",
    "9" * 400,
    "x" * 5000,
)
ODD_NUMBERS = (
    -1,
    0,
    1,
    2,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    10**12,
    10**15,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e18,
    1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
)

texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=20))
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.integers(), st.floats(), texts)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def damaged(draw: Draw, data: bytes, most: int = 4) -> bytes:
    """Bytes with up to so many places changed, taken out, put in, or said twice."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(changed)))
        length = min(draw(st.sampled_from((1, 2, 4, 16, 512))), len(changed) - start)
        kind = draw(st.sampled_from(("set", "set", "flip", "cut", "insert", "repeat", "end")))
        if kind == "set":
            changed[start : start + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "flip" and length:
            changed[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[start : start + length]
        elif kind == "insert":
            changed[start:start] = draw(st.binary(max_size=16))
        elif kind == "repeat":
            changed[start:start] = changed[start : start + length]
        elif kind == "end":
            del changed[start:]
    return bytes(changed)


@st.composite
def changed_values(draw: Draw, document: Any, most: int = 3) -> Any:
    """A JSON value with up to so many fields replaced, taken out, put in, renamed or said twice."""
    value = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, most))):
        value = _changed(draw, value)
    return value


@st.composite
def json_documents(draw: Draw, document: Any) -> bytes:
    """A JSON document as somebody else, or a broken disk, may leave it."""
    shape = draw(st.sampled_from(("values", "values", "values", "bytes", "deep", "any")))
    if shape == "deep":
        return draw(st.sampled_from((b"[" * 20_000, b'{"a":' * 20_000, b"[" * 500 + b"]" * 500)))
    if shape == "any":
        return draw(st.one_of(st.binary(max_size=40), json_values.map(_dumped)))
    text = _dumped(draw(changed_values(document)))
    return (
        draw(damaged(text))
        if shape == "bytes"
        else draw(st.sampled_from((text, text, b"\xef\xbb\xbf" + text, text + b"\n\n")))
    )


@st.composite
def json_lines(draw: Draw, rows: Sequence[Any]) -> bytes:
    """Lines of JSON, some of them changed."""
    lines = [draw(json_documents(row)) if draw(st.booleans()) else _dumped(row) for row in rows]
    end = draw(st.sampled_from((b"\n", b"\n", b"\r\n", b"\n\n", b"")))
    return end.join([*lines, b""])


def toml(value: Any) -> str:
    """A value as TOML; of what TOML has not, something near."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(held)}" for key, held in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _changed(draw: Draw, value: Any) -> Any:  # noqa: PLR0911 (one a kind of damage)
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value, key=repr)))
        kind = draw(st.sampled_from(("inner", "inner", "inner", "drop", "rename", "add")))
        if kind == "drop":
            return {name: held for name, held in value.items() if name != key}
        if kind == "rename":
            return {(draw(texts) if name == key else name): held for name, held in value.items()}
        if kind == "add":
            return {**value, draw(texts): draw(json_values)}
        return {**value, key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        kind = draw(st.sampled_from(("inner", "inner", "drop", "twice")))
        if kind == "inner":
            return [*value[:place], _changed(draw, value[place]), *value[place + 1 :]]
        return [*value[:place], *([value[place]] * (2 if kind == "twice" else 0)), *value[place + 1 :]]
    return draw(st.one_of(json_values, _near(value)))


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int | float):
        return st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(-3, 3).map(lambda step: value + step))
    if isinstance(value, str):
        return st.one_of(texts, texts.map(lambda more: value + more))
    return st.just([value]) if isinstance(value, Mapping | list) else json_values
