"""Files of infra/ and the schemas that they must satisfy."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SCHEMAS = ROOT / "tests" / "schemas"


def documents(path: str) -> list[Any]:
    """The documents of a YAML file under infra/."""
    return list(yaml.safe_load_all((INFRA / path).read_text()))


def crd_errors(schema: str, resource: Any) -> list[str]:
    """Where a resource violates its CustomResourceDefinition; an unknown field is an error."""
    text = gzip.decompress((SCHEMAS / schema).read_bytes())
    return schema_errors(_strict(json.loads(text)), resource)


def schema_errors(schema: Any, value: Any) -> list[str]:
    """Where `value` violates a JSON schema."""
    return [f"{error.json_path}: {error.message}" for error in Draft7Validator(schema).iter_errors(value)]


def _strict(schema: Any) -> Any:
    """A CRD's schema as a JSON schema that allows no other fields."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **({"pattern": schema["pattern"]} if "pattern" in schema else {})}
    made = {key: _strict(value) for key, value in schema.items()}
    is_object = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    if is_object and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        names = schema["properties"]
        if "metadata" in names and "apiVersion" in names:  # the API server checks these itself
            return made | {
                "additionalProperties": False,
                "properties": made["properties"] | {"metadata": {"type": "object"}},
            }
        made["additionalProperties"] = False
    return made


def changed(document: Any, place: Sequence[Any], value: Any) -> Any:
    """A copy with one value replaced at `place`."""
    result = copy.deepcopy(document)
    part = result
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    return result
