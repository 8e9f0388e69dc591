"""A small labelled dataset, a small model, and one thread of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from labelled_data import labelled_dataset

from model import ConvMAEConfig
from pipeline.load.dataset import Dataset


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are small: more threads only wait for each other when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """61 images of four classes in eight shards."""
    return labelled_dataset(tmp_path_factory.mktemp("labelled"), {"ant": 20, "bee": 16, "cat": 15, "dog": 10})


@pytest.fixture(scope="session")
def small() -> ConvMAEConfig:
    """A model for images of 32 x 32."""
    return ConvMAEConfig(image_size=32)
