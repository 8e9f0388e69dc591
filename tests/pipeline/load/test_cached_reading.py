"""Batches through the disk cache: the same as without, and without the object store once the lanes are there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.ingest.writer import tar_url
from pipeline.load.batch import Batch
from pipeline.load.block_cache import CachePlace
from pipeline.load.dataset import Dataset
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class CountingStorage(Storage):
    """A store that records every ranged read of a tar."""

    reads: list[tuple[str, int, int]] = field(default_factory=list, hash=False, compare=False)

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        if url.endswith(".tar"):
            self.reads.append((url, offset, length))
        return super().read_range(url, offset, length, etag)


ORDER = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)
EPOCH = ORDER.steps_per_epoch


def cached(dataset: Dataset, folder: Path, limit_bytes: int = 10**9) -> tuple[Dataset, list[tuple[str, int, int]]]:
    storage = CountingStorage()
    place = CachePlace(str(folder), limit_bytes)
    return Dataset(storage, dataset.url, dataset.manifest, cache=place), storage.reads


def batches(dataset: Dataset, start: int, stop: int, **changes: Any) -> list[Batch]:
    options = {"image_shape": (16, 16), "rank": 0, "world_size": 1, "seed": 5, "threads": 2} | changes
    return list(Loader(dataset, options.pop("order", ORDER), **options).batches(start, stop))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.sample_ids, b.sample_ids) and torch.equal(a.images, b.images)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("order", [ORDER, Order(61, 5, 1, 2, 6, 3), Order(61, 4, 4, 0, 1, 100), Order(61, 60, 12, 3)])
@pytest.mark.parametrize("open_bytes", [1 << 30, 0])
def test_the_second_epoch_asks_the_object_store_for_nothing(
    dataset: Dataset, tmp_path: Path, order: Order, open_bytes: int
) -> None:
    """Also where windows do not fit into memory, and where an epoch omits blocks that the next one takes."""
    through, reads = cached(dataset, tmp_path)
    steps = order.steps_per_epoch
    plain = batches(dataset, 0, 6 * steps, order=order)
    generator = Loader(
        through, order, image_shape=(16, 16), rank=0, world_size=1, seed=5, threads=1, prefetch_batches=0,
        open_bytes=open_bytes,
    ).batches(0, 6 * steps)  # fmt: skip

    found, counts = [], []
    for batch in generator:
        found.append(batch)
        counts.append(len(reads))

    assert same(found, plain)
    # What an epoch omits is fetched in the background: an epoch may be over before the last of it is there.
    assert counts[4 * steps - 1] == counts[-1]
    if open_bytes:
        blocks_and_shard_edges = order.blocks + len(dataset.manifest.shards)
        assert counts[-1] <= 2 * blocks_and_shard_edges + order.global_batch_size
    assert through.counters.read().cache_hits > 0


def test_the_ranks_of_a_node_and_a_restart_share_what_is_there(dataset: Dataset, tmp_path: Path) -> None:
    plain = batches(dataset, 0, 3 * EPOCH)
    for rank in range(2):
        through, _ = cached(dataset, tmp_path)
        batches(through, 0, EPOCH + 1, rank=rank, world_size=2)

    through, reads = cached(dataset, tmp_path)

    assert same(batches(through, 1, 3 * EPOCH), plain[1:])
    assert reads == []


READER = """
import sys
from pipeline.load.block_cache import CachePlace
from pipeline.load.dataset import Dataset
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage
dataset = Dataset.open(Storage(), sys.argv[1], cache=CachePlace(sys.argv[2], 10**9))
order = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)
loader = Loader(dataset, order, image_shape=(16, 16), rank=0, world_size=1, seed=5, threads=2)
for batch in loader.batches(0, 10**9):
    print(batch.step, flush=True)
"""


@pytest.mark.slow
def test_a_reader_that_is_killed_leaves_a_cache_that_serves(dataset: Dataset, tmp_path: Path) -> None:
    command = [sys.executable, "-c", READER, dataset.url, str(tmp_path)]
    for steps in (2, 4, 2 * EPOCH):
        reader = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert reader.stdout
        for _ in range(steps):
            reader.stdout.readline()
        reader.kill()
        reader.wait()
        reader.stdout.close()

    through, reads = cached(dataset, tmp_path)

    assert same(batches(through, 0, 2 * EPOCH), batches(dataset, 0, 2 * EPOCH))
    assert reads == []


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_block_that_is_damaged_on_the_disk_is_fetched_again(dataset: Dataset, tmp_path: Path, damage: str) -> None:
    first, _ = cached(dataset, tmp_path)
    plain = batches(first, 0, 2 * EPOCH)
    blocks = [path for path in tmp_path.rglob("0*-*") if path.is_file()]
    for path in blocks:
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:300]), "empty": b""}[damage])

    through, reads = cached(dataset, tmp_path)
    found = batches(through, 0, 2 * EPOCH)

    assert same(found, plain)
    assert through.counters.read().cache_damaged >= len(blocks)
    assert len(blocks) <= len(reads)
    again, reads = cached(dataset, tmp_path)
    assert same(batches(again, 0, 2 * EPOCH), plain)
    assert reads == []


def test_a_block_with_a_bad_sample_is_not_kept(own_dataset: Dataset, tmp_path: Path) -> None:
    """So that it is good again once the object is restored."""
    path = Path(tar_url(own_dataset.url, "shard-000002"))
    data = bytearray(path.read_bytes())
    data[own_dataset.rows([30])[0].row.offset + 9] ^= 1
    path.write_bytes(data)
    through, _ = cached(own_dataset, tmp_path / "cache")

    found = {sample.id: sample for sample in through.read_each([29, 30], range(28, 32))}

    assert found[30].fault == "checksum"  # type: ignore[union-attr]
    assert found[29] == own_dataset.read([29])[0]
    assert not list((tmp_path / "cache").rglob("0*-*"))


def test_a_small_budget_slows_and_changes_nothing(dataset: Dataset, tmp_path: Path) -> None:
    limit = dataset.manifest.tar_bytes // 3
    through, _ = cached(dataset, tmp_path, limit)

    found = batches(through, 0, 3 * EPOCH)

    assert same(found, batches(dataset, 0, 3 * EPOCH))
    sizes = [path.stat().st_size for path in tmp_path.rglob("0*-*")]
    assert sum(sizes) <= limit + 2 * max(sizes), (
        "a block that is on its way is missed by who counts; here are two threads"
    )
    hits = through.counters.read()
    assert hits.cache_hits > 0.15 * (hits.cache_hits + hits.cache_misses)


def test_a_full_disk_changes_nothing(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through, _ = cached(dataset, tmp_path)
    write, written = Path.write_bytes, []

    def full(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    found = batches(through, 0, 3 * EPOCH)

    assert same(found, batches(dataset, 0, 3 * EPOCH))
    assert through.cache and not through.cache.storing


def test_another_data_set_with_the_same_names_is_not_mixed_up(
    dataset: Dataset, own_dataset: Dataset, tmp_path: Path
) -> None:
    first, _ = cached(dataset, tmp_path)
    batches(first, 0, EPOCH)
    other, _ = cached(own_dataset, tmp_path)
    assert other.digest == first.digest  # the same images: a copy elsewhere shares the cache

    shorter = Dataset(
        CountingStorage(),
        own_dataset.url,
        type(own_dataset.manifest)(2, "other", (), 0, own_dataset.manifest.shards),
        cache=CachePlace(str(tmp_path), 10**9),
    )
    batches(shorter, 0, 1)

    assert shorter.digest != first.digest
    assert shorter.counters.read().cache_hits == 0
