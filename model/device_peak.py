"""The most operations a second that a device can do: by its maker's data sheet, or as a matrix product reaches here.

Peaks are dense (no structured sparsity), of matrix products that add up in fp32, for one device as PyTorch counts them.
fp32 is IEEE's and not TF32, as runs compute it (jobs/rank/gpu.py). Makers quote boost clocks, which no long run keeps.

Sources: NVIDIA's data sheets of V100, T4, A10, A10G, A30, A40, A100, L4, L40, L40S, H100, H200, H20, HGX B200 and B300
(a system's figures by its GPUs), GB200 and GB300 NVL72 (likewise), RTX A6000; its white papers of GA102 (RTX 3090), Ada
(RTX 4090, RTX 6000 Ada) and RTX Blackwell (RTX 5090); AMD's data sheets of MI210 to MI355X. The A800, H800 and GH200
have the cores of A100 and H100. Where sheets give figures with sparsity, these are half of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SHEET_TFLOPS: Mapping[str, tuple[float, float]] = {
    "V100 SXM2": (15.7, 0.0),
    "V100 SXM3": (15.7, 0.0),
    "V100 PCIE": (14.0, 0.0),
    "V100S PCIE": (16.4, 0.0),
    "T4": (8.1, 0.0),
    "A10": (31.2, 125.0),
    "A10G": (35.0, 70.0),
    "A30": (10.3, 165.0),
    "A40": (37.4, 149.7),
    "A100": (19.5, 312.0),
    "A800": (19.5, 312.0),
    "RTX A6000": (38.7, 154.8),
    "RTX 3090": (35.6, 71.0),
    "L4": (30.3, 121.0),
    "L40": (90.5, 181.05),
    "L40S": (91.6, 362.05),
    "RTX 4090": (82.6, 165.2),
    "RTX 6000 Ada": (91.1, 364.2),
    "H100": (67.0, 989.4),
    "H100 PCIE": (51.0, 756.5),
    "H100 NVL": (60.0, 835.5),
    "H800": (67.0, 989.4),
    "H800 PCIE": (51.0, 756.5),
    "GH200": (67.0, 989.4),
    "H200": (67.0, 989.4),
    "H200 NVL": (60.0, 835.5),
    "H20": (44.0, 148.0),
    "B200": (75.0, 2250.0),
    "B300": (75.0, 2250.0),
    "GB200": (80.0, 2500.0),
    "GB300": (0.0, 2500.0),
    "RTX 5090": (104.8, 209.5),
    "MI210": (45.3, 181.0),
    "MI250X": (47.85, 191.5),  # of one of its two dies, each of which is a device
    "MI300X": (163.4, 1307.4),
    "MI325X": (163.4, 1307.4),
    "MI355X": (157.3, 2516.6),
}
"""fp32 and bf16 by words of the device's name; 0 where the sheet gives none, or the device has no units for it."""
_OTHER_DEVICES = frozenset({"MIG", "LAPTOP", "TI", "SUPER", "D", "MAX"})
"""Words by which a name is that of a slice of a device, or of another one."""

_SIZES = (512, 1024, 2048, 4096, 8192)
_TRIES = 3
_LONG_SECONDS = 0.01
"""A product that takes so long is large enough for the device."""
_LEAST_SECONDS = 0.25
"""How long such products are repeated: whatever else the machine does, it seldom does it all the time."""


@dataclass(frozen=True)
class DevicePeak:
    """A device and its peak in one precision."""

    name: str
    flops_per_second: float
    is_measured: bool
    """As a matrix product reaches it here, which is less than a data sheet would say."""


def device_peak(device: torch.device, dtype: torch.dtype) -> DevicePeak:
    """The peak of a device: by its data sheet, else measured, as that of a CPU always is.

    Args:
        device: A GPU, or the CPU with as many threads as this process computes with.
        dtype: float32 or bfloat16.

    Raises:
        RuntimeError: It was to be measured, and the device cannot do the product, or has no memory for it.
    """
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'' if threads == 1 else 's'}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    known = sheet_peak(name, dtype)
    return DevicePeak(name, known or measured_peak(device, dtype), is_measured=known is None)


def sheet_peak(name: str, dtype: torch.dtype) -> float | None:
    """Operations a second by the data sheet; None for a device or a precision that is not in the table.

    Args:
        name: As PyTorch gives it: `NVIDIA H100 80GB HBM3`.
        dtype: float32 or bfloat16.
    """
    words = set(re.findall(r"\w+", name.upper()))
    keys = [key for key in SHEET_TFLOPS if set(key.upper().split()) <= words]
    if not keys or words & _OTHER_DEVICES:
        return None
    teraflops = SHEET_TFLOPS[max(keys, key=lambda key: len(key.split()))][dtype == torch.bfloat16]
    return teraflops * 1e12 if teraflops else None


def measured_peak(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second of the fastest of some matrix products, which grow until one takes 10 ms.

    Args:
        device: What computes.
        dtype: Of the factors.
        clock: Seconds.

    Raises:
        RuntimeError: As `device_peak`.
    """
    best, began = 0.0, clock()
    generator = torch.Generator(device).manual_seed(0)  # the run's own randomness is left alone
    for size in _SIZES:
        factors = torch.rand((2, size, size), device=device, generator=generator).to(dtype)
        seconds = min(_product_seconds(factors, clock) for _ in range(_TRIES))
        is_large_enough = seconds >= _LONG_SECONDS
        while is_large_enough and clock() - began < _LEAST_SECONDS:
            seconds = min(seconds, _product_seconds(factors, clock))
        best = max(best, 2 * size**3 / seconds)
        if is_large_enough:
            break
    return best


def _product_seconds(factors: torch.Tensor, clock: Callable[[], float]) -> float:
    began = clock()
    torch.mm(factors[0], factors[1])
    if factors.device.type == "cuda":
        torch.cuda.synchronize(factors.device)
    return clock() - began
