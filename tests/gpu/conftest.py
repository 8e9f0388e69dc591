"""What one GPU proves of the model and of a training step: `make test-gpu`, on a machine with no more than is needed.

The same tests run on the CPU, in a process of their own, as part of the fast tests (tests/jobs/rank/test_gpu_tests.py).
Nothing here may import Ray, a store's client, Prometheus or an image library but simplejpeg.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

DEVICE = os.environ.get("CONVMAE_TEST_DEVICE", "")
ABSENT = ("PIL", "aiobotocore", "aiohttp", "boto3", "botocore", "google_crc32c", "prometheus_client", "ray", "s3fs")

collect_ignore_glob = [] if DEVICE else ["*"]


class Absent:
    """Stands for a machine on which these are not installed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"{name} must not be needed here", name=name)
        return None


if DEVICE:
    sys.meta_path.insert(0, Absent())


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def group(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, as a rank has it."""
    from jobs.step.engine import initialize_deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        meeting_point = (Path(folder) / "meeting-point").as_uri()
        dist.init_process_group(backend, init_method=meeting_point, rank=0, world_size=1)
        initialize_deepspeed(device.type)
        yield
        dist.destroy_process_group()
