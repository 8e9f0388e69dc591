"""Checks of a node, on this one: what is well passes, and each fault is found. Faults are put into what is checked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.health import node_probes
from jobs.health.interface import NodeContext, ProbeResult
from jobs.health.node_probes import DiskProbe, MemoryProbe, ProductProbe, checked


@pytest.fixture
def context(tmp_path: Path) -> NodeContext:
    return NodeContext("cpu", (tmp_path, tmp_path / "not" / "there yet"))


def test_a_node_that_is_well_passes_within_a_second_of_work(context: NodeContext) -> None:
    checked(context)
    began = time.process_time()

    results = checked(context)

    assert {name: result.passed for name, result in results.items()} == {"memory": True, "product": True, "disk": True}
    assert time.process_time() - began < 1.0
    assert not list(context.folders[0].iterdir()), "nothing is left behind"


def test_a_bit_that_is_lost_in_memory_is_found(context: NodeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = torch.Tensor.clone

    def bad_clone(tensor: torch.Tensor) -> torch.Tensor:
        copy = clone(tensor)
        copy[12345] ^= 1 << 7
        return copy

    monkeypatch.setattr(torch.Tensor, "clone", bad_clone)

    result = MemoryProbe().poll(context)

    assert result.passed is False and result.detail.startswith("1 of ")


@pytest.mark.parametrize("place", [(0, 0), (300, 511)])
def test_one_element_of_a_product_that_is_off_by_one_is_found(
    context: NodeContext, monkeypatch: pytest.MonkeyPatch, place: tuple[int, int]
) -> None:
    product = torch.Tensor.__matmul__

    def bad_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result = product(left, right)
        if result.dtype == torch.float32:
            result[place] += 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", bad_product)

    assert ProductProbe().poll(context).passed is False


def test_a_disk_that_gives_back_something_else_is_found(context: NodeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is changed behind the back of the one who wrote it, when it leaves the kernel's memory."""

    def forget(handle: int, *_: int) -> None:
        import os

        os.pwrite(handle, b"\0" * 16, 1000)

    monkeypatch.setattr(node_probes.os, "posix_fadvise", forget)

    result = DiskProbe().poll(context)

    assert result.passed is False and str(context.folders[0]) in result.detail


def test_a_disk_that_is_full_fails_with_its_error() -> None:
    full = NodeContext("cpu", (Path("/proc"),))  # a file system in which nobody makes files

    result = checked(full, [DiskProbe()])["disk"]

    assert result.passed is False and "Error" in result.detail


def test_a_check_that_raises_has_failed_and_the_others_are_made(context: NodeContext) -> None:
    class OutOfMemory:
        name = "memory"

        def poll(self, _: NodeContext) -> ProbeResult:
            raise RuntimeError("CUDA out of memory\nand more")

    probes: list[Any] = [OutOfMemory(), DiskProbe()]
    results = checked(context, probes)

    assert results["memory"] == ProbeResult(passed=False, detail="RuntimeError: CUDA out of memory")
    assert results["disk"].passed
