from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.load.dataset import Dataset
from pipeline.load.device_copy import DeviceCopy
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order

ORDER = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_the_cpu_the_hosts_own_tensor_is_handed_over_unpinned() -> None:
    device_copy = DeviceCopy(torch.device("cpu"))
    host = device_copy.empty((2, 3), torch.uint8)

    assert device_copy.finish(device_copy.start(host)) is host
    assert not host.is_pinned()


def test_on_the_cpu_memory_that_is_written_again_is_copied() -> None:
    device_copy = DeviceCopy(torch.device("cpu"))
    memory = np.arange(6, dtype=np.uint8)
    with device_copy.pinned(memory):
        images = device_copy.finish(device_copy.start_from(memory))
        memory[:] = 0

    assert images.tolist() == list(range(6))


@needs_gpu
@pytest.mark.parametrize("in_processes", [False, True])
def test_batches_on_a_gpu_are_those_of_the_host(dataset: Dataset, in_processes: bool) -> None:
    def batches(device: str) -> list[torch.Tensor]:
        options = {"image_shape": (16, 16), "rank": 0, "world_size": 1, "seed": 5, "threads": 2}
        options["in_processes"] = in_processes
        loader = Loader(dataset, ORDER, device=torch.device(device), **options)
        return [batch.images.cpu() for batch in loader.batches(0, 15)]

    assert all(torch.equal(one, two) for one, two in zip(batches("cuda"), batches("cpu"), strict=True))
