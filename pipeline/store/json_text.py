"""JSON of unknown origin, parsed in one place: whatever is not JSON is a ValueError, however it fails to be."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from pipeline.errors import clipped


def parsed_json(data: bytes | str) -> Any:
    """The value that a JSON document in UTF-8 holds.

    `json.loads` takes NaN, which JSON does not have, and guesses at UTF-16; for endless brackets it raises
    RecursionError.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return _DECODER.decode(data if isinstance(data, str) else data.decode())
    except RecursionError:
        raise ValueError("too deep") from None


def parsed_object(data: bytes | str) -> dict[str, Any]:
    """A JSON document that is an object.

    Raises:
        ValueError: It is not.
    """
    value = parsed_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"no object, but {clipped(repr(value))}")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
