"""The tests of `make test-gpu`, on the CPU: the same code, with another device and backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[3]


def test_they_pass_on_the_cpu_where_nothing_is_installed_but_what_they_need() -> None:
    environment = {**os.environ, "CONVMAE_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--confcutdir=tests/gpu", "tests/gpu"]

    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stdout[-5000:]
    *_, summary = ended.stdout.splitlines()
    assert " passed, 3 skipped" in summary and "failed" not in summary, "the three need a GPU"


def test_they_are_a_line_where_there_is_no_gpu() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    command = ["make", "--no-print-directory", "test-gpu", f"GPU_PYTHON={sys.executable}"]
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)

    assert ended.stdout == "test-gpu: torch sees no GPU here: skipped\n"
