"""Reading of PyTorch files that are not trusted: the official ones, and those of wrapped or compiled models."""

from __future__ import annotations

import argparse
import io
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from jobs.checkpoint.deepspeed_files.torch_archive import LARGEST_PICKLE_BYTES, check_directory
from jobs.errors import WeightsFileError
from jobs.weights.weight_files import SUFFIX
from pipeline.errors import clipped

_NESTED = ("model", "state_dict", "module")
"""Names under which training code keeps a state dict: the official one, many others, DeepSpeed."""
_DEEPEST_NESTING = 3
_END_BYTES = 22
"""Of a zip archive's end, without a comment."""
_END_64_BYTES = 56 + 20
"""Of what precedes it if offsets have 64 bits."""


def is_safetensors(path: Path, url: str) -> bool:
    """Whether a file is none of PyTorch's: by its name, or by its first bytes: the header is JSON."""
    with path.open("rb") as file:
        return url.endswith(SUFFIX) or file.read(9)[8:] == b"{"


def torch_tensors(path: Path, url: str) -> dict[str, Tensor]:
    """The state dict of a local file.

    Raises:
        WeightsFileError: It is no PyTorch file of tensors, or damaged.
    """
    remedy = "give the .pth that the official main_pretrain.py or `convmae export --format official` wrote"
    try:
        state = _state_dict(path)
    # The file is not trusted, and torch.load raises whatever a pickle makes it raise. Its message is not shown, since
    # it advises loading the file without checks.
    except Exception as error:
        rule = f"must be a whole PyTorch file of tensors alone ({_reason(error)})"
        raise WeightsFileError("weights", rule, url, remedy) from None
    if state is None:
        raise WeightsFileError("weights", 'must hold a state dict, or one under "model" or "state_dict"', url, remedy)
    for name, tensor in state.items():
        is_dense = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested
        if not is_dense or tensor.is_meta:
            rule = f"must be dense tensors with values ({clipped(name)} is {_kind(tensor)})"
            raise WeightsFileError(
                "weights", rule, url, "save the model's state dict from the CPU, as it is in training"
            )
    return state


def _kind(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    return str(tensor.layout).removeprefix("torch.") if tensor.layout is not torch.strided else type(tensor).__name__


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__


def _state_dict(path: Path) -> dict[str, Tensor] | None:
    """Plain tensors by name, without attributes that the file gave them; None if there is anything else.

    Raises:
        Exception: Of any kind.
    """
    with path.open("rb") as opened:
        is_archive = opened.read(4) == b"PK\x03\x04"
    if is_archive:
        _check_archive(path)
    # The official code saves its argparse.Namespace beside the weights: a plain record, which runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd pickles and tensors, most of which are refused below
        if is_archive:
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with _BoundedPickles(io.FileIO(path), LARGEST_PICKLE_BYTES) as older:
                found = torch.load(older, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        return None
    state = _innermost(found)
    if not state:
        return None
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in dict.items(state)):
        return None
    return {name: Tensor.detach(value) for name, value in dict.items(state)}


def _innermost(found: dict[Any, Any]) -> dict[Any, Any]:
    """The state dict, without what was saved around it."""
    for _ in range(_DEEPEST_NESTING):
        within = [value for name in _NESTED if isinstance(value := dict.get(found, name), dict)]
        if not within:
            break
        found = within[0]
    return found


def _check_archive(path: Path) -> None:
    """Refuse an archive that takes more memory than its file, or in which torch would read another directory.

    Raises:
        zipfile.BadZipFile: It is one of these.
    """
    size = path.stat().st_size
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        check_directory(archive, size)
        if not _is_read_alike(file, size, archive.start_dir):
            raise zipfile.BadZipFile("its directory is not where its end says")


def _is_read_alike(file: BinaryIO, size: int, found: int) -> bool:
    """Whether torch reads the directory that Python found.

    Python reads the one right before the archive's end, torch the one at the offset that the end gives.
    """
    file.seek(max(0, size - _END_BYTES - _END_64_BYTES))
    end = file.read()
    places = {int.from_bytes(end[-6:-2], "little")}
    if end[-42:-38] == b"PK\x06\x07":  # the offset of the record with 64-bit offsets; torch writes both records
        record = int.from_bytes(end[-34:-26], "little")
        if end[:4] != b"PK\x06\x06" or record != size - len(end):
            return False
        places = {*(places - {0xFFFFFFFF}), int.from_bytes(end[48:56], "little")}
    return end[-22:-18] == b"PK\x05\x06" and places == {found}


class _BoundedPickles(io.BufferedReader):
    """A file of PyTorch before 1.6: pickles, which Python reads through this, and values, which torch reads past it."""

    def __init__(self, raw: io.RawIOBase, limit_bytes: int) -> None:
        super().__init__(raw)
        self._limit_bytes = self._left = limit_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().readline(size))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"more than {self._limit_bytes} bytes of objects")
        return data
