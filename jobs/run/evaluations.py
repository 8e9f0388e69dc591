"""Evaluations that are kept with a run, each as `evaluations/<key>.json`; the key is of what was measured how."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import Field, Strict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from jobs.errors import RunError
from jobs.run.rows import Integer, Number, Text, fault_rule, parsed
from pipeline.store.storage import Storage

FOLDER = "evaluations"
_NAMES = {"linear": "linear probe", "head": "own head", "finetune": "fine-tuned"}
_NAME = re.compile(r"[0-9a-f]{16}\.json")


class _Accuracy(TypedDict):
    accuracy: Annotated[float, Strict(), Field(ge=0, le=1)] | None
    samples: Integer


class _Result(TypedDict):
    method: Text
    settings: dict[str, Any]
    top1: _Accuracy


class _Samples(TypedDict):
    url: Text
    samples: Integer


class _Weights(TypedDict):
    name: Text
    step: NotRequired[Integer]
    epoch: NotRequired[Number]


class _Report(TypedDict):
    weights: _Weights
    train: _Samples
    test: _Samples
    results: list[_Result]


_REPORT = TypeAdapter(_Report)


def key_of(what: Mapping[str, Any]) -> str:
    """A name for whatever decides the figures of an evaluation, given as plain values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def url_of(folder: str, key: str) -> str:
    """Where an evaluation is kept.

    Args:
        folder: Of a run, or of an ablation.
        key: From `key_of`.
    """
    return Storage.join(folder, FOLDER, f"{key}.json")


def read_evaluation(storage: Storage, url: str) -> dict[str, Any] | None:
    """An evaluation as `convmae evaluate --json` writes it; None if there is none.

    Raises:
        RunError: The file is damaged.
    """
    try:
        report = parsed(storage.read(url), url)
    except FileNotFoundError:
        return None
    try:
        _REPORT.validate_python(report)
    except ValidationError as error:
        remedy = "delete the file: the command that wrote it writes it again"
        raise RunError("evaluation", fault_rule(error), url, remedy) from None
    assert isinstance(report, dict)
    return report


def list_evaluations(storage: Storage, folder: str) -> list[dict[str, Any]]:
    """All that are kept in a folder, in no particular order."""
    names = filter(_NAME.fullmatch, storage.list_names(Storage.join(folder, FOLDER)))
    found = (read_evaluation(storage, Storage.join(folder, FOLDER, name)) for name in sorted(names))
    return [report for report in found if report is not None]


def accuracies(report: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 of each method, in percent, by its name for people."""
    return {
        method_name(result["method"], result["settings"]): 100 * result["top1"]["accuracy"]
        for result in report["results"]
        if result["top1"]["accuracy"] is not None
    }


def method_name(method: str, settings: Mapping[str, Any]) -> str:
    """For people."""
    return f"kNN, k = {settings.get('k')}" if method == "knn" else _NAMES.get(method, method)
