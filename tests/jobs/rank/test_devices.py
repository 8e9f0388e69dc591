"""Tensors that jobs/ and pipeline/ make say where: on a GPU one on the CPU is a wait, or an error."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]
FACTORIES = frozenset(("arange", "empty", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"))


def placeless(source: str) -> Iterator[int]:
    """Lines that make a tensor and do not name its device."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            is_of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if is_of_torch and not {"device", "pin_memory"} & {keyword.arg for keyword in node.keywords}:
                yield node.lineno


def test_one_that_names_no_device_is_seen() -> None:
    assert list(placeless("import torch\ntorch.zeros(3)\ntorch.zeros(3, device='cpu')\nnumpy.zeros(3)")) == [2]


@pytest.mark.parametrize("folder", ["jobs", "pipeline"])
def test_every_tensor_is_made_where_it_says(folder: str) -> None:
    found = {
        str(path.relative_to(PROJECT)): lines
        for path in (PROJECT / folder).rglob("*.py")
        if (lines := list(placeless(path.read_text())))
    }
    assert not found
