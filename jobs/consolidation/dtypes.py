"""Conversion of floating-point types without torch; numpy has no bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.consolidation.file_layout import DTYPES
from jobs.errors import CheckpointError


def converted(tensor: str, data: bytes | memoryview, source: str, dtype: str) -> bytes:
    """Values of one floating-point type as values of another, each rounded to the nearest, ties to even.

    Args:
        tensor: Its name, for the message.
        data: Little-endian values of type `source`.
        source: `F64`, `F32`, `BF16` or `F16`.
        dtype: `F32`, `BF16` or `F16`.

    Raises:
        CheckpointError: A finite value is beyond what `dtype` can hold.
    """
    values = _as_float32(data, source)
    result: NDArray[Any] = values
    rounded: NDArray[Any] = values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            rounded = result = values.astype(np.float16)
    elif dtype == "BF16":
        result = _bfloat16(values)
        rounded = (result.astype(np.uint32) << 16).view(np.float32)
    fits = np.isfinite(rounded)
    if not fits.all():
        _refuse_overflow(tensor, data, source, dtype, fits)
    return result.tobytes()


def _as_float32(data: bytes | memoryview, source: str) -> NDArray[np.float32]:
    match source:
        case "F32":
            return np.frombuffer(data, np.float32)
        case "BF16":
            return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        case _:
            with np.errstate(over="ignore"):
                return np.frombuffer(data, np.float16 if source == "F16" else np.float64).astype(np.float32)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _refuse_overflow(tensor: str, data: bytes | memoryview, source: str, dtype: str, fits: NDArray[np.bool_]) -> None:
    values = np.frombuffer(data, np.float64) if source == "F64" else _as_float32(data, source)
    lost = values[np.isfinite(values) & ~fits]
    if lost.size:
        name = next(name for name, stored in DTYPES.items() if stored == dtype)
        rule, value = f"must hold every value of {tensor}", f"{name}, and one is {lost[0]:g}"
        raise CheckpointError("--dtype", rule, value, "use bf16 or fp32" if name == "fp16" else "use another")
