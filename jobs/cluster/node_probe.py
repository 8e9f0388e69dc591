"""A probe of one node: versions, clock, disks, memory, GPUs, bandwidth to the store and to its peers."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from jobs.cluster.interfaces import choose_interface
from jobs.cluster.ray_internals.core import health_settings
from pipeline.store.storage import Storage

PACKAGES = ("torch", "deepspeed", "ray", "numpy", "simplejpeg", "s3fs", "webdataset")
"""Their versions decide what is computed or read."""
RAY_SETTINGS: Mapping[str, int] = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 6,
}
"""The head's health checks of nodes, as infra/ sets them: a silent node is dead after 36 s. A link that is repaired
after 15 s carries nothing for up to 15 s more, until TCP tries again."""
SHARED_MEMORY = Path("/dev/shm")
REDUCE_BYTES = 16 * 1024**2
READ_THREADS = 8
READ_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Disk:
    """A disk to which a worker writes."""

    folder: str
    free_bytes: int
    total_bytes: int
    writable: bool


@dataclass(frozen=True)
class NodeFacts:
    """What a node reports of itself."""

    host: str
    versions: Mapping[str, str]
    """By package; `-` if one is not installed."""
    cpus: int
    memory_bytes: int
    shared_memory_bytes: int
    """Size of /dev/shm; 0 if there is none."""
    disks: Sequence[Disk]
    gpus: Sequence[str]
    """Name and driver of each, as nvidia-smi prints them."""


class NodeProbe:
    """The probe of the node it runs on. A plain class: jobs.cluster.doctor makes an actor of it on each node.

    Blocking: every method; `read_bytes_per_second` and `reduce` for seconds.
    """

    def clock(self) -> float:
        """Unix time here."""
        return time.time()

    def facts(self, folders: Sequence[str]) -> NodeFacts:
        """Gather the facts.

        Args:
            folders: Where workers will write, besides the temporary folder.
        """
        shared = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else 0
        return NodeFacts(
            host=socket.gethostname(),
            versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            cpus=os.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            shared_memory_bytes=shared,
            disks=[_disk(Path(folder)) for folder in (tempfile.gettempdir(), *folders)],
            gpus=_gpus(),
        )

    def ray_settings(self) -> Mapping[str, int]:
        """How this node's Ray processes were set to look after others, by the setting's name; matters on the head."""
        return health_settings(RAY_SETTINGS)

    def read_bytes_per_second(self, storage: Storage, url: str, size_bytes: int) -> float:
        """Read an object by ranges, as a loader does, on several threads.

        Args:
            storage: With the credentials to use.
            url: The object.
            size_bytes: Its size.
        """
        offsets = range(0, size_bytes, READ_BYTES)
        storage.read_range(url, 0, 1)  # opens the connection
        began = time.perf_counter()
        with ThreadPoolExecutor(READ_THREADS) as threads:
            read = sum(threads.map(lambda offset: len(storage.read_range(url, offset, READ_BYTES)), offsets))
        return read / (time.perf_counter() - began)

    def free_address(self) -> tuple[str, int]:
        """Address of this node and a free port on it: where the ranks of `reduce` meet."""
        from ray.util import get_node_ip_address

        host: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def reduce(self, backend: str, meeting: str, rank: int, world_size: int, seconds: float) -> float:
        """All-reduce a tensor with the other nodes; returns bytes per second of the second try.

        Args:
            backend: `gloo`, or `nccl` on this process's first GPU.
            meeting: `tcp://HOST:PORT` of rank 0.
            rank: This node's.
            world_size: Number of nodes.
            seconds: How long to wait for the others.

        Raises:
            RuntimeError: They did not come, or the sum is wrong.
        """
        import torch
        import torch.distributed as dist
        from ray.util import get_node_ip_address

        choose_interface(get_node_ip_address(), os.environ)  # type: ignore[no-untyped-call]
        device = "cuda" if backend == "nccl" else "cpu"
        dist.init_process_group(
            backend, init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds)
        )
        try:
            elapsed = 0.0
            for _ in range(2):  # the first opens the connections
                values = torch.full((REDUCE_BYTES // 4,), float(rank + 1), device=device)
                began = time.perf_counter()
                dist.all_reduce(values)
                total = float(values[-1])
                elapsed = time.perf_counter() - began
            if total != world_size * (world_size + 1) / 2:
                raise RuntimeError(f"the sum over {world_size} ranks is {total}")
            return REDUCE_BYTES / elapsed
        finally:
            dist.destroy_process_group()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _disk(folder: Path) -> Disk:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    usage = shutil.disk_usage(there)
    return Disk(str(folder), usage.free, usage.total, os.access(there, os.W_OK))


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]
