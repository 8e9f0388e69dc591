"""What only a GPU shows: pinned hand-over on a stream of its own, and compiled kernels of one shape."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from steps import Rank, recipe_for

from pipeline.load.device_copy import DeviceCopy


@pytest.fixture(autouse=True)
def on_a_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")


def test_batches_are_pinned_and_copied_on_a_stream_of_their_own(device: torch.device) -> None:
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


def test_memory_that_other_processes_write_is_pinned_while_it_is_used(device: torch.device) -> None:
    device_copy = DeviceCopy(device)
    shared = np.frombuffer(mmap.mmap(-1, 64 * 3 * 224 * 224), np.uint8).reshape(64, 3, 224, 224)
    with device_copy.pinned(shared):
        shared[:] = np.random.default_rng(0).integers(0, 256, shared.shape, np.uint8)
        assert torch.from_numpy(shared).is_pinned()
        copy = device_copy.start_from(shared)
        assert copy.copied is not None
        copy.copied.synchronize()
        expected = shared.copy()
        shared[:] = 0
        images = device_copy.finish(copy)

    assert torch.equal(images.cpu(), torch.from_numpy(expected))
    assert not torch.from_numpy(shared).is_pinned()


@pytest.mark.usefixtures("group")
def test_a_compiled_model_is_compiled_for_one_shape_and_trains_the_same(device: torch.device) -> None:
    from torch._dynamo.utils import counters

    plain, compiled = (Rank(recipe_for(device, compile=on), device) for on in (False, True))
    losses = compiled.train(1)
    graphs = counters["stats"]["unique_graphs"]
    losses += compiled.train(2)

    assert losses == pytest.approx(plain.train(3), rel=1e-3)
    assert counters["stats"]["unique_graphs"] == graphs > 0
