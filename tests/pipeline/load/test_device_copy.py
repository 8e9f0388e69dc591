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
def test_on_a_gpu_batches_are_pinned_and_copied_on_a_stream_of_their_own() -> None:
    device = torch.device("cuda", 0)
    device_copy = DeviceCopy(device)
    host = device_copy.empty((64, 3, 224, 224), torch.uint8)
    host.random_(0, 256)
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(50):
        busy = torch.tanh(busy @ busy)

    copy = device_copy.start(host)
    assert copy.copied is not None
    copy.copied.synchronize()
    ready_while_busy = not torch.cuda.current_stream(device).query()

    images = device_copy.finish(copy)
    assert host.is_pinned() and images.device == device
    assert ready_while_busy
    assert torch.equal(images.cpu(), host)


@needs_gpu
def test_batches_on_a_gpu_are_those_of_the_host(dataset: Dataset) -> None:
    def batches(device: str) -> list[torch.Tensor]:
        options = {"image_shape": (16, 16), "rank": 0, "world_size": 1, "seed": 5, "threads": 2}
        loader = Loader(dataset, ORDER, device=torch.device(device), **options)
        return [batch.images.cpu() for batch in loader.batches(0, 15)]

    assert all(torch.equal(one, two) for one, two in zip(batches("cuda"), batches("cpu"), strict=True))
