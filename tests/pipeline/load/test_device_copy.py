from __future__ import annotations

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


@needs_gpu
def test_batches_on_a_gpu_are_those_of_the_host(dataset: Dataset) -> None:
    def batches(device: str) -> list[torch.Tensor]:
        options = {"image_shape": (16, 16), "rank": 0, "world_size": 1, "seed": 5, "threads": 2}
        loader = Loader(dataset, ORDER, device=torch.device(device), **options)
        return [batch.images.cpu() for batch in loader.batches(0, 15)]

    assert all(torch.equal(one, two) for one, two in zip(batches("cuda"), batches("cpu"), strict=True))
