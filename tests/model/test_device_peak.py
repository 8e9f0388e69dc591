from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from model import device_peak
from model.device_peak import SHEET_TFLOPS, measured_peak, sheet_peak

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [
        ("Tesla V100-SXM2-32GB", 15.7, None),
        ("Tesla V100-PCIE-16GB", 14.0, None),
        ("NVIDIA A10", 31.2, 125.0),
        ("NVIDIA A10G", 35.0, 70.0),
        ("NVIDIA A30", 10.3, 165.0),
        ("NVIDIA A40", 37.4, 149.7),
        ("NVIDIA A100-SXM4-40GB", 19.5, 312.0),
        ("NVIDIA A100 80GB PCIe", 19.5, 312.0),
        ("NVIDIA L4", 30.3, 121.0),
        ("NVIDIA L40", 90.5, 181.05),
        ("NVIDIA L40S", 91.6, 362.05),
        ("NVIDIA H100 80GB HBM3", 67.0, 989.4),
        ("NVIDIA H100 PCIe", 51.0, 756.5),
        ("NVIDIA H100 NVL", 60.0, 835.5),
        ("NVIDIA GH200 480GB", 67.0, 989.4),
        ("NVIDIA H200", 67.0, 989.4),
        ("NVIDIA H20", 44.0, 148.0),
        ("NVIDIA B200", 75.0, 2250.0),
        ("NVIDIA GB200", 80.0, 2500.0),
        ("NVIDIA GB300", None, 2500.0),
        ("NVIDIA GeForce RTX 3090", 35.6, 71.0),
        ("NVIDIA GeForce RTX 4090", 82.6, 165.2),
        ("NVIDIA GeForce RTX 5090", 104.8, 209.5),
        ("NVIDIA RTX 6000 Ada Generation", 91.1, 364.2),
        ("AMD Instinct MI250X", 47.85, 191.5),
        ("AMD Instinct MI300X", 163.4, 1307.4),
    ],
)
def test_the_peak_is_that_of_the_device_and_precision(name: str, fp32: float | None, bf16: float | None) -> None:
    for dtype, teraflops in ((torch.float32, fp32), (torch.bfloat16, bf16)):
        assert sheet_peak(name, dtype) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA RTX 6000",
        "NVIDIA A100X",
        "NVIDIA H2000",
        "CPU, 4 threads",
        "",
    ],
)
def test_no_other_device_is_taken_for_one_of_the_table(name: str) -> None:
    assert sheet_peak(name, torch.float32) is None
    assert sheet_peak(name, torch.bfloat16) is None


def test_every_line_of_the_table_is_found_by_its_own_words() -> None:
    for key, teraflops in SHEET_TFLOPS.items():
        found = [sheet_peak(f"NVIDIA {key}", dtype) for dtype in (torch.float32, torch.bfloat16)]
        assert [peak or 0 for peak in found] == pytest.approx([each * 1e12 for each in teraflops])


def test_products_grow_until_one_takes_long_and_the_fastest_of_a_quarter_second_counts() -> None:
    of_512 = [(0.0, 0.03), (0.03, 0.035), (0.04, 0.06)]
    of_1024 = [(0.06, 0.11), (0.11, 0.125), (0.125, 0.18), 0.18, (0.18, 0.188), 0.19, (0.2, 0.26), 0.26]
    readings = iter(np.hstack([0.0, *of_512, *of_1024]).tolist())

    peak = measured_peak(CPU, torch.float32, clock=lambda: next(readings))

    assert peak == pytest.approx(2 * 1024**3 / 0.008)
    assert next(readings, None) is None  # 1024 was the last size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_in_seconds_and_leaves_randomness_alone(dtype: torch.dtype) -> None:
    state, began = torch.get_rng_state(), time.perf_counter()

    found = device_peak.device_peak(CPU, dtype)

    assert time.perf_counter() - began < 30  # on a machine with other work
    assert found.is_measured
    assert found.name.startswith(f"CPU, {torch.get_num_threads()} thread")
    assert found.flops_per_second > 1e8
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_measured_is_an_error_that_names_no_peak() -> None:
    with pytest.raises(RuntimeError):
        device_peak.device_peak(torch.device("meta"), torch.float32)
