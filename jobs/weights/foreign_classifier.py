"""Fine-tuned classifiers of the official code: they know neither their model nor the names of their classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.errors import WeightsFileError
from jobs.weights.consolidated import ClassifierHead
from jobs.weights.names import bare_name
from jobs.weights.torch_file import is_safetensors, torch_tensors
from jobs.weights.weight_checks import check_dtypes, check_finite
from jobs.weights.weight_files import opened_file, tensors_in
from model import Classifier, ConvMAEConfig
from model.errors import ModelConfigError, WeightsError, listed

_HEADS = {"full": "head.weight", "linear": "head.1.weight"}
"""Of each kind of classifier, a tensor that has a row for each class."""


@dataclass(frozen=True)
class ForeignClassifier:
    """A classifier whose classes are known by their numbers alone."""

    tensors: dict[str, Tensor]
    """By our names."""
    head: ClassifierHead


def foreign_classifier(path: Path, url: str, config: ConvMAEConfig) -> ForeignClassifier | None:
    """The classifier in a file; None where it is none: it has no head, or one of other features than the mean's.

    Args:
        path: A local PyTorch or safetensors file, with official names or ours.
        url: Where it comes from.
        config: Of the model that was fine-tuned.

    Raises:
        WeightsFileError: The file cannot be read, or is of another model (names the tensors that differ).
    """
    given = _bare_tensors(path, url, config)
    kind = next((kind for kind, name in _HEADS.items() if name in given), None)
    if kind is None or "fc_norm.weight" not in given:
        return None
    classes = len(given[_HEADS[kind]]) if given[_HEADS[kind]].ndim else 0
    check_dtypes({name: value.dtype for name, value in given.items() if value.is_floating_point()}, url)
    check_finite(given.items(), url)
    try:
        model = Classifier(config, classes, kind=kind)
        model.load_official(given)
    except WeightsError as error:
        assert isinstance(error.value, list)
        rule = f"must be those of a classifier of the recipe's model ({listed(error.value)})"
        raise WeightsFileError("weights", rule, url, "name its recipe with --recipe, and its size") from None
    except ModelConfigError as error:
        rule = f"must have a head whose {error.field} {error.rule}"
        raise WeightsFileError("weights", rule, url, error.remedy) from None
    return ForeignClassifier(dict(model.state_dict()), ClassifierHead(kind, tuple(map(str, range(classes)))))


def _bare_tensors(path: Path, url: str, config: ConvMAEConfig) -> dict[str, Tensor]:
    if is_safetensors(path, url):
        with opened_file(path, url) as file:
            found = dict(tensors_in(file, url))
    else:
        found = torch_tensors(path, url)
    with torch.device("meta"):
        ours = Classifier(config, 2).state_dict()
    known = {*ours, *(name.removeprefix("encoder.") for name in ours)}
    return {bare_name(name, known): value for name, value in found.items()}
