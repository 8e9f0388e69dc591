from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are small: more threads only wait for each other when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """Inputs, weights and results of the official implementation."""
    return {
        **load_file(GOLDEN / "convmae_tiny_inputs.safetensors"),
        **load_file(GOLDEN / "convmae_tiny_outputs.safetensors"),
    }


@pytest.fixture(scope="session")
def golden_views() -> dict[str, Tensor]:
    """Inputs, weights and results of the official FastConvMAE, which masks each image four times."""
    return {
        **load_file(GOLDEN / "fastconvmae_tiny_inputs.safetensors"),
        **load_file(GOLDEN / "fastconvmae_tiny_outputs.safetensors"),
    }


@pytest.fixture(scope="session")
def official_weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weight."): value for name, value in golden.items() if name.startswith("weight.")}
