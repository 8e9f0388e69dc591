"""Faults of the object store, with a real S3 server: the same images come, or the fault is reported; never a hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos_proxy import ChaosProxy

from jobs.stack.record import Stack
from pipeline.access.s3_options import OBSTORE, READER
from pipeline.errors import DatasetError, StalledError
from pipeline.host import daemon_threads
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import tar_url, write_shard
from pipeline.load.batch import Batch
from pipeline.load.block_cache import CachePlace
from pipeline.load.dataset import Dataset
from pipeline.load.image_maker import BadSamplePolicy
from pipeline.load.loader import Loader
from pipeline.order.sample_order import ConsumedDigest, Order
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

ORDER = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)
EPOCH = ORDER.steps_per_epoch
STEPS = 3 * EPOCH
SKIP = BadSamplePolicy("skip")


@pytest.fixture(scope="module")
def storage(local_stack: Stack, reader: str) -> Storage:
    return Storage.from_environment({**local_stack.environment(), READER: reader})


def make_dataset(storage: Storage, photographs: Path, url: str) -> Dataset:
    sources = find_sources(storage, str(photographs))
    tasks = plan_shards(sources, Sharding(13))
    Manifest.of(tasks, [write_shard(storage, url, task) for task in tasks], sources.classes).save(storage, url, [])
    return Dataset.open(storage, url)


@pytest.fixture(scope="module")
def dataset(storage: Storage, photographs: Path) -> Dataset:
    """The photographs in five shards on S3; for reading only."""
    return make_dataset(storage, photographs, "s3://convmae/chaos/shared")


@pytest.fixture
def own_dataset(storage: Storage, photographs: Path, tmp_path: Path) -> Dataset:
    """The same, for a test that damages it."""
    return make_dataset(storage, photographs, f"s3://convmae/chaos/{tmp_path.name}")


@pytest.fixture
def proxy(local_stack: Stack) -> Iterator[ChaosProxy]:
    with ChaosProxy(local_stack.endpoint).running() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset) -> list[Batch]:
    return batches(dataset)


def through(proxy: ChaosProxy, dataset: Dataset, **options: Any) -> Dataset:
    """The dataset as it is read through the proxy."""
    return Dataset.open(replace(dataset.storage, endpoint_url=proxy.endpoint), dataset.url, **options)


def loader(dataset: Dataset, **changes: Any) -> Loader:
    options = {"image_shape": (16, 16), "rank": 0, "world_size": 1, "seed": 5, "threads": 2} | changes
    return Loader(dataset, ORDER, **options)


def batches(dataset: Dataset, stop: int = STEPS, **changes: Any) -> list[Batch]:
    return list(loader(dataset, **changes).batches(0, stop))


def digests(found: list[Batch]) -> list[str]:
    """Of each epoch."""
    sums = [ConsumedDigest()] * (STEPS // EPOCH)
    for batch in found:
        sums[batch.epoch] += ConsumedDigest.of(batch.sample_ids.numpy())
    return [str(digest) for digest in sums]


def assert_same(found: list[Batch], undisturbed: list[Batch]) -> None:
    assert digests(found) == digests(undisturbed)
    assert all(torch.equal(one.images, two.images) for one, two in zip(found, undisturbed, strict=True))
    assert not any(batch.substitutions for batch in found)


def test_reads_name_the_version_that_was_ingested(
    proxy: ChaosProxy, dataset: Dataset, undisturbed: list[Batch]
) -> None:
    assert_same(batches(through(proxy, dataset)), undisturbed)

    etags = {tar_url("", entry.name): entry.etag for entry in dataset.manifest.shards}
    assert all(etags.values())
    for request in proxy.tar_requests():
        assert request.if_match == etags["/" + request.path.rpartition("/")[2]]
        assert request.agent.startswith("object_store") == (dataset.storage.s3.reader == OBSTORE)


def test_a_server_that_is_killed_mid_epoch_and_comes_back_changes_nothing(
    local_stack: Stack, dataset: Dataset, undisturbed: list[Batch]
) -> None:
    found = []
    for batch in loader(dataset, prefetch_batches=0).batches(0, STEPS):
        if batch.step == EPOCH // 2:
            stack = Stack.load(local_stack.settings.home)
            assert stack
            pid = stack.status()["s3"].pid
            assert pid
            os.kill(pid, signal.SIGKILL)
        found.append(batch)

    assert_same(found, undisturbed)


# Up to eight reads are under way. Backing off, each asks about twelve times in 30 s, at most some twenty times.
@pytest.mark.parametrize(("seconds", "most"), [(1.0, 60), pytest.param(30.0, 160, marks=pytest.mark.slow)])
def test_a_server_that_is_busy_for_a_while_changes_nothing_and_is_not_flooded(
    proxy: ChaosProxy, dataset: Dataset, undisturbed: list[Batch], seconds: float, most: int
) -> None:
    found = []
    for batch in loader(through(proxy, dataset), prefetch_batches=0).batches(0, STEPS):
        if batch.step == EPOCH // 2:
            proxy.behaviour.busy_until = time.monotonic() + seconds
        found.append(batch)

    assert_same(found, undisturbed)
    assert 1 <= proxy.refused < most


@pytest.mark.slow
def test_bodies_that_break_off_are_resumed_where_they_ended(
    proxy: ChaosProxy, dataset: Dataset, undisturbed: list[Batch]
) -> None:
    proxy.behaviour.cuts = lambda request: request.number % 3 == 1

    assert_same(batches(through(proxy, dataset)), undisturbed)

    requests = proxy.tar_requests()
    for cut in (request for request in requests if request.number % 3 == 1):
        rest = cut.first + sum(cut.sent)
        assert any((other.path, other.first) == (cut.path, rest) for other in requests[cut.number + 1 :])


def test_a_slow_server_changes_nothing(proxy: ChaosProxy, dataset: Dataset, undisturbed: list[Batch]) -> None:
    proxy.behaviour.bytes_per_second = 500_000

    assert_same(batches(through(proxy, dataset)), undisturbed)


@pytest.mark.slow
def test_a_byte_that_is_damaged_on_the_way_is_read_again(
    proxy: ChaosProxy, dataset: Dataset, undisturbed: list[Batch]
) -> None:
    proxy.behaviour.flips = lambda request: request.number in (3, 70)

    assert_same(batches(through(proxy, dataset), policy=SKIP), undisturbed)
    assert len(proxy.tar_requests()) > 70


def test_a_server_that_never_answers_is_reported_with_stage_shard_and_image(
    proxy: ChaosProxy, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_threads, "SHUTDOWN_SECONDS", 0.1)
    proxy.behaviour.hangs = lambda request: request.number == 20
    # The thread that hangs outlives this test, and would try the closed proxy again while others run.
    impatient = replace(dataset.storage, endpoint_url=proxy.endpoint, retry_seconds=2.0)

    with pytest.raises(StalledError, match=r"stage read.*\.jpg at offset \d+ of s3://convmae/chaos/shared/shard-.*tar"):
        batches(Dataset.open(impatient, dataset.url), stall_seconds=1.0)


def replaced_by(storage: Storage, dataset: Dataset, change: Any) -> None:
    url = tar_url(dataset.url, "shard-000002")
    data = bytearray(storage.read(url))
    change(data)
    storage.write(url, bytes(data))


def flip(dataset: Dataset, place: int) -> Any:
    (row,) = dataset.rows([30])

    def change(data: bytearray) -> None:
        data[row.row.offset + place] ^= 1

    return change


def cut(dataset: Dataset) -> Any:
    (row,) = dataset.rows([30])
    return lambda data: data.__delitem__(slice(row.row.offset + 10, None))


DAMAGES = [
    ("header", lambda dataset: flip(dataset, -300)),
    ("checksum", lambda dataset: flip(dataset, 300)),
    ("truncated", cut),
]


@pytest.mark.parametrize(("fault", "change"), DAMAGES)
def test_an_object_that_was_altered_is_reported_or_replaced(
    storage: Storage, own_dataset: Dataset, undisturbed: list[Batch], fault: str, change: Any
) -> None:
    replaced_by(storage, own_dataset, change(own_dataset))

    with pytest.raises(DatasetError, match=r"shard-000002\.tar.*was replaced.*ETag.*\.jpg"):
        batches(own_dataset)
    found = batches(own_dataset, policy=SKIP)
    assert {item.bad.id for batch in found for item in batch.substitutions} == set(range(26, 39))
    assert {item.bad.fault for batch in found for item in batch.substitutions} == {"replaced"}

    unpinned = Dataset.open(storage, own_dataset.url, check_etags=False)
    with pytest.raises(DatasetError, match=r"shard-000002\.tar"):
        batches(unpinned)
    found = batches(unpinned, policy=SKIP)
    bad = {item.bad.id for batch in found for item in batch.substitutions}
    assert bad == (set(range(30, 39)) if fault == "truncated" else {30})
    assert fault in {item.bad.fault for batch in found for item in batch.substitutions}
    assert digests(found) == digests(undisturbed)


def test_an_object_that_is_replaced_mid_epoch_is_reported(storage: Storage, own_dataset: Dataset) -> None:
    with pytest.raises(DatasetError, match="was replaced"):
        for batch in loader(own_dataset, prefetch_batches=0).batches(0, STEPS):
            if batch.step == EPOCH // 2:
                replaced_by(storage, own_dataset, lambda data: data.extend(bytes(512)))


def test_an_object_that_is_replaced_while_a_body_is_resumed_is_not_mixed(
    proxy: ChaosProxy, storage: Storage, own_dataset: Dataset
) -> None:
    """Even where no ETag is pinned."""
    url = tar_url(own_dataset.url, "shard-000002")
    before = storage.read(url)

    def cuts(request: Any) -> bool:
        if request.number == 0:
            storage.write(url, before[::-1])
        return bool(request.number == 0)

    proxy.behaviour.cuts = cuts
    reader = replace(storage, endpoint_url=proxy.endpoint)

    with pytest.raises(ValueError, match="must be the one that was meant"):
        reader.read_range(url, 0, len(before))


def test_the_second_epoch_sends_no_request_where_the_lanes_fit_the_cache(
    proxy: ChaosProxy, dataset: Dataset, undisturbed: list[Batch], tmp_path: Path
) -> None:
    cached = through(proxy, dataset, cache=CachePlace(str(tmp_path), 10**9))
    found, requests = [], []
    for batch in loader(cached, prefetch_batches=0).batches(0, STEPS):
        found.append(batch)
        requests.append(len(proxy.requests))

    assert_same(found, undisturbed)
    assert requests[2 * EPOCH - 1] == requests[-1]
    assert cached.counters.read().requests == len(proxy.tar_requests())
