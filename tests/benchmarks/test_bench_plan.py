from __future__ import annotations

import bench_plan
import numpy as np
import pytest

from pipeline.load.dataset import Dataset
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("large"))
    bench_plan.write_manifest(folder, 20_000)
    return folder


@pytest.mark.parametrize(("world_size", "rank"), [(64, 21), (3, 2)])
def test_opening_a_stream_reads_as_many_pages_as_the_first_batch_has_blocks_not_as_there_are_shards(
    url: str, world_size: int, rank: int
) -> None:
    storage = bench_plan.IndexStandIn()
    dataset = Dataset.open(storage, url)
    order = Order(dataset.samples, 4096, 256, seed=0)
    step = 7 * order.steps_per_epoch + 12_345
    ids = order.rank_batch(step, rank, world_size)

    rows = dataset.rows(ids)

    blocks = np.unique(order.block_of(ids)).size
    assert [found.id for found in rows] == ids.tolist()
    assert [found.row.key for found in rows] == [f"{sample % 10_000:09d}" for sample in ids.tolist()]
    assert len(storage.requests) <= blocks < 1500
    assert max(storage.requests) < 40_000  # a page or two; more where blocks are neighbours


def test_the_windows_behind_it_cost_a_request_a_block(url: str) -> None:
    measured = bench_plan.open_stream(url, lanes=64, world_size=64, rank=3, step=99, windows=True, latency_seconds=0.0)

    assert measured["requests"] <= 1 + 2 * 64  # the first batch's pages, the blocks of the window, and of the next


def test_the_stand_in_serves_what_a_real_index_holds(url: str) -> None:
    dataset = Dataset.open(bench_plan.IndexStandIn(), url)

    last = dataset.rows([10_000 * 20_000 - 1])[0]

    assert (last.shard, last.place, last.row.member) == (19_999, 9_999, "000009999.jpg")
    assert Storage().size(f"{url}/manifest.json") < 160 * 20_000
