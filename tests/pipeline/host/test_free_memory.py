"""Memory that is left, of the machine and of a container with a limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pipeline.host.free_memory import free_memory_bytes

MB = 1 << 20


def cgroups(folder: Path, limit: str, use: str, statistics: str, most: str) -> Path:
    """A container that uses 300 MB, 100 of them for files that it read."""
    kind = "inactive_file" if limit == "memory.max" else "total_inactive_file"
    for name, text in ((limit, most), (use, str(300 * MB)), (statistics, f"anon 1\n{kind} {100 * MB}\n")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")


@pytest.mark.parametrize("names", [V2, V1], ids=["v2", "v1"])
def test_of_a_container_with_a_limit(tmp_path: Path, names: tuple[str, str, str]) -> None:
    assert free_memory_bytes(cgroups(tmp_path, *names, most=str(500 * MB))) == 300 * MB


@pytest.mark.parametrize("most", ["max", str(1 << 62)])
def test_without_a_limit_it_is_that_of_the_machine(tmp_path: Path, most: str) -> None:
    found = free_memory_bytes(cgroups(tmp_path, *V2, most=most))

    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_where_the_kernel_shows_no_limits(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path) > 0


def test_a_container_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    assert free_memory_bytes(cgroups(tmp_path, *V2, most=str(100 * MB))) == 0
