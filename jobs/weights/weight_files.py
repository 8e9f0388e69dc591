"""Single safetensors files on local disk: opened, read, written, and the model that their metadata names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jobs.errors import WeightsFileError
from model import ConvMAEConfig
from pipeline.errors import clipped
from pipeline.host.scratch import scratch_folder
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

SUFFIX = ".safetensors"
_LENGTH_BYTES = 8
"""Of the length of a safetensors header, which precedes it."""


@contextmanager
def opened_file(path: Path, url: str) -> Iterator[Any]:
    """A safetensors file, open for reading.

    Raises:
        WeightsFileError: It is not one or not whole, also if this shows only when it is read.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        remedy = "give a file that `convmae consolidate` or `convmae import` wrote"
        raise WeightsFileError("weights", f"must be a whole safetensors file ({error})", url, remedy) from None


def tensors_in(file: Any, url: str) -> dict[str, Tensor]:
    """Every tensor of an open file.

    Raises:
        WeightsFileError: A tensor cannot be made.
    """
    try:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (TypeError, RuntimeError):  # a hostile header may name shapes that torch cannot make
        rule, remedy = "must hold tensors that can be made", "get the file again from where it was written"
        raise WeightsFileError("weights", rule, url, remedy) from None


def shapes_of(file: Any) -> dict[str, SimpleNamespace]:
    """Shapes by name, without tensors, which torch cannot make of every type."""
    return {name: SimpleNamespace(shape=tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a local file; the same tensors and metadata give the same bytes."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=dict(metadata))
    with path.open("r+b") as file:  # safetensors writes metadata in an order that varies from call to call
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length
        file.seek(_LENGTH_BYTES)
        file.write(text)


def model_config(metadata: Mapping[str, str], url: str) -> ConvMAEConfig:
    """The configuration with which a file was made.

    Raises:
        WeightsFileError: It has none, or not one of a known model.
    """
    remedy = "give a file that `convmae consolidate` or `convmae import` wrote"
    if "model" not in metadata:
        raise WeightsFileError("weights", "must name its model in its metadata", url, remedy)
    try:
        return ConvMAEConfig(**parsed_object(metadata["model"]))
    except (ValueError, TypeError) as error:
        rule = f"must be of a known model ({clipped(str(error))})"
        raise WeightsFileError("weights", rule, url, remedy) from None


def model_json(config: ConvMAEConfig) -> str:
    """The configuration of a model, for the metadata of a file."""
    return json.dumps(asdict(config), sort_keys=True)


@contextmanager
def local_copy(storage: Storage, url: str) -> Iterator[Path]:
    """The file on local disk while the context is open.

    Raises:
        WeightsFileError: It is missing.
    """
    with scratch_folder() as scratch:
        path = Path(scratch, "weights")
        try:
            storage.download(url, path)
        except FileNotFoundError:
            remedy = "`convmae checkpoints RUN` shows which steps a run has; `convmae consolidate` writes the file"
            raise WeightsFileError("weights", "must exist", url, remedy) from None
        yield path
