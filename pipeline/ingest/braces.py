"""Names that a pattern with braces stands for, as webdataset takes them: `00{000..123}.tar`, `{train,val}.tar`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import braceexpand

from pipeline.errors import SourceError, clipped

MOST_NAMES = 1_000_000
"""Of one pattern. `braceexpand` holds those of each pair of braces in memory."""
_MOST_DEPTH = 10
_TOO_MANY = MOST_NAMES + 1
_RANGE_DIGITS = 18


def expanded(pattern: str) -> Iterator[str]:
    r"""The names, in order; a backslash escapes a brace, comma or backslash after it.

    Raises:
        SourceError: It stands for too many, or its braces do not match; before a name is made.
    """
    if _count(pattern) > MOST_NAMES:
        remedy = "check the numbers in the braces, or name a folder of tars"
        raise SourceError("source", f"must stand for at most {MOST_NAMES} names", clipped(pattern), remedy)
    names: Iterator[str] = braceexpand.braceexpand(pattern)
    return names


def _count(pattern: str) -> int:
    """How many names there are, by arithmetic; `_TOO_MANY` where there are more than may be."""
    sums, products, starts = [0], [1], [0]  # of alternatives before the last comma, of what lies behind it; by depth
    for token in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        kind, place = token[0], token.start()
        if kind == "{":
            sums.append(0)
            products.append(1)
            starts.append(place + 1)
        elif kind == "," and len(sums) > 1:
            sums[-1] += products[-1]
            products[-1] = 1
        elif kind == "}" and len(sums) > 1:
            inner = sums.pop() + products.pop()
            count = _range_count(pattern[starts.pop() : place]) or inner
            products[-1] = min(products[-1] * count, _TOO_MANY)
        elif kind == "}":
            raise _unbalanced(pattern)
        if len(sums) > _MOST_DEPTH:
            raise SourceError("source", f"must nest braces at most {_MOST_DEPTH} deep", clipped(pattern), "write fewer")
    if len(sums) > 1:
        raise _unbalanced(pattern)
    return products[0]


def _range_count(text: str) -> int | None:
    """How many names `first..last` or `first..last..step` stands for; None where it is no range."""
    numbers, letters = braceexpand.int_range_re, braceexpand.char_range_re  # type: ignore[attr-defined]
    for kind, place in ((numbers, int), (letters, braceexpand.alphabet.index)):
        if found := kind.match(text):
            first, last, step = found.groups()
            if max(map(len, found.groups(""))) > _RANGE_DIGITS:
                return _TOO_MANY
            return int(abs(place(last) - place(first)) // (int(step or 1) or 1) + 1)
    return None


def _unbalanced(pattern: str) -> SourceError:
    remedy = "close every brace; write a backslash before one that belongs to a name"
    return SourceError("source", "must have braces in pairs", clipped(pattern), remedy)
