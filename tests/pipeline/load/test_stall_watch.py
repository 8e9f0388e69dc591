from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pipeline.errors import StalledError
from pipeline.host import daemon_threads
from pipeline.load import image_maker
from pipeline.load.dataset import Dataset
from pipeline.load.device_copy import DeviceCopy
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage

ORDER = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)
STALL_SECONDS = 0.4


@dataclass(frozen=True)
class HangingStorage(Storage):
    """A store that never answers for one tar."""

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        if url.endswith("shard-000002.tar"):
            RELEASE.wait(30)
        return super().read_range(url, offset, length, etag)


RELEASE = threading.Event()


@pytest.fixture(autouse=True)
def hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever hangs, hangs until the end of the test."""
    monkeypatch.setattr(daemon_threads, "SHUTDOWN_SECONDS", 0.1)
    RELEASE.clear()
    yield
    RELEASE.set()


def stalled(dataset: Dataset) -> str:
    loader = Loader(
        dataset, ORDER, image_shape=(16, 16), rank=0, world_size=1, seed=5, threads=2, stall_seconds=STALL_SECONDS
    )
    began = time.monotonic()
    with pytest.raises(StalledError) as caught:
        list(loader.batches(0, 10))
    assert time.monotonic() - began < 10 * STALL_SECONDS
    return str(caught.value)


def test_a_read_that_hangs_is_reported_with_shard_image_and_offset(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        message = stalled(Dataset(HangingStorage(), dataset.url, dataset.manifest))

    assert "stage read" in message
    assert "shard-000002.tar" in message and ".jpg" in message and "offset" in message
    assert any("stage read" in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert any("read_range" in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


def test_decoding_that_hangs_is_reported(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = dataset.read([int(ORDER.batch(0)[5])])[0]
    decode = image_maker.decode

    def slow(data: bytes, channels: int, bits: int) -> Any:
        if data == hanging.data:
            RELEASE.wait(30)
        return decode(data, channels, bits)

    monkeypatch.setattr(image_maker, "decode", slow)
    message = stalled(dataset)

    assert "stage decode" in message
    assert f"{hanging.member} at offset {hanging.offset} of {hanging.url}" in message


def test_a_copy_to_the_device_that_hangs_is_reported(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    start = DeviceCopy.start

    def slow(self: DeviceCopy, host: torch.Tensor) -> Any:
        RELEASE.wait(30)
        return start(self, host)

    monkeypatch.setattr(DeviceCopy, "start", slow)

    assert "step 0 hangs in stage hand-over" in stalled(dataset)


def test_a_consumer_that_takes_its_time_is_no_stall(dataset: Dataset) -> None:
    loader = Loader(
        dataset, ORDER, image_shape=(16, 16), rank=0, world_size=1, seed=5, threads=2, stall_seconds=STALL_SECONDS
    )
    for batch in loader.batches(0, 2):
        time.sleep(1.5 * STALL_SECONDS)
        assert batch.images.shape[0] == 12
