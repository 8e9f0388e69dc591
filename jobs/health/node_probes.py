"""Checks of one node, before a rank trains on it: its memory, its matrix products, its disks. Under a second in all.

Each writes or computes what has one right result, and compares. How fast a GPU is, is for the evaluator to judge beside
the others. What only shows after hours, under heat or load, is not found here: that is what stragglers are named for.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from jobs.health.interface import NodeContext, NodeProbe, ProbeResult

MEMORY_WORDS = 1 << 23
"""Of 32 bits."""
PRODUCT_SIZES = {"cpu": 512, "cuda": 4096}
"""Rows and columns: a product takes milliseconds."""
PRODUCTS = 3
"""The fastest counts: the first one loads libraries."""
LARGEST_FACTOR = 8
"""Of the integers that are multiplied: all sums are exact in fp32, and in TF32 all factors."""
CHECK_COLUMNS = 8
DISK_BYTES = 4 << 20
PRODUCT_SPEED = "product_flops_per_second"


class MemoryProbe:
    """Writes a pattern to the memory of the device, copies it, and compares."""

    name = "memory"

    def poll(self, context: NodeContext) -> ProbeResult:
        """Raises what the allocator raises."""
        pattern = torch.arange(MEMORY_WORDS, device=context.device, dtype=torch.int32) * 0x2545F491
        for written in (pattern, ~pattern):
            wrong = int((written.clone() != written).sum())
            if wrong:
                return ProbeResult(passed=False, detail=f"{wrong} of {MEMORY_WORDS} words differ from what was written")
        return ProbeResult(passed=True)


class ProductProbe:
    """Multiplies matrices of small integers, whose product is exact, and checks it as Freivalds (1977) did."""

    name = "product"

    def poll(self, context: NodeContext) -> ProbeResult:
        """The speed counts on a GPU; cores are shared."""
        device = torch.device(context.device)
        size = PRODUCT_SIZES[device.type]
        generator = torch.Generator().manual_seed(0)
        left, right = (_integers((size, size), generator).to(device) for _ in range(2))
        vectors = _integers((size, CHECK_COLUMNS), generator).to(device).double()
        expected = left.double() @ (right.double() @ vectors)
        fastest = float("inf")
        for _ in range(PRODUCTS):
            _wait(device)
            began = time.perf_counter()
            product = left @ right
            _wait(device)
            fastest = min(fastest, time.perf_counter() - began)
            if not torch.equal(product.double() @ vectors, expected):
                return ProbeResult(passed=False, detail="a product of matrices of integers is wrong")
        speed = {PRODUCT_SPEED: 2 * size**3 / fastest} if device.type == "cuda" else {}
        return ProbeResult(speed, passed=True)


class DiskProbe:
    """Writes to the disks of the folders, and reads it back from them."""

    name = "disk"

    def poll(self, context: NodeContext) -> ProbeResult:
        """Raises what the file system raises."""
        data = os.urandom(DISK_BYTES)
        for folder in context.folders:
            with tempfile.NamedTemporaryFile(dir=_existing(folder), prefix="convmae-preflight-") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else the kernel's copy is read
                file.seek(0)
                if file.read() != data:
                    return ProbeResult(passed=False, detail=f"a file in {folder} differs from what was written")
        return ProbeResult(passed=True)


NODE_PROBES: Sequence[NodeProbe] = (MemoryProbe(), ProductProbe(), DiskProbe())


def checked(context: NodeContext, probes: Sequence[NodeProbe] = NODE_PROBES) -> dict[str, ProbeResult]:
    """What each probe found, by its name; one that raises has failed. Nothing of a GPU's memory is kept."""
    results = {probe.name: _polled(probe, context) for probe in probes}
    if torch.device(context.device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return results


def _polled(probe: NodeProbe, context: NodeContext) -> ProbeResult:
    try:
        return probe.poll(context)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return ProbeResult(passed=False, detail=f"{type(error).__name__}: {lines[0]}")


def _integers(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(-LARGEST_FACTOR, LARGEST_FACTOR + 1, shape, generator=generator, device="cpu")
    return drawn.float()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
