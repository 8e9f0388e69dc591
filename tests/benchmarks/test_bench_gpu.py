from __future__ import annotations

import json
from pathlib import Path

import bench_gpu
import pytest
import torch


@pytest.mark.slow
def test_rows_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, where no peak is known."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "none")
    monkeypatch.setattr(bench_gpu, "LOADED_IMAGES", 64)
    file = tmp_path / "found.json"
    small = ["--preset", "small", "--batches", "1", "--rounds", "1", "--precisions", "fp32", "--no-compile"]

    bench_gpu.main([*small, "--device", "cpu", "--json", str(file)])

    found = json.loads(file.read_text())
    assert [row["side"] for row in found["rows"]] == ["sparse", "dense", "MAE"]
    sparse, dense, _ = found["rows"]
    assert 0 < sparse["seconds"] < dense["seconds"] and sparse["mfu"] is None
    assert found["loader"]["images_per_second"] > 0
    assert "deterministic kernels: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_operations_are_those_that_pytorch_counts() -> None:
    options = bench_gpu.parse(["--preset", "small", "--device", "cpu"])
    one, two = (bench_gpu.flops_of(bench_gpu.Side("sparse", "fp32", bench_gpu.options_of(options, n))) for n in (1, 2))

    assert two == pytest.approx(2 * one, rel=0.02)
    assert one > 1e9
