from __future__ import annotations

import numpy as np
import pytest

from pipeline.order.sample_order import Order
from pipeline.order.shares import Share

ORDERS = [
    Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2),
    Order(5000, global_batch_size=64, lanes=8, seed=1, block_samples=32, window_blocks=4),
    Order(5000, global_batch_size=64, lanes=1, seed=1, block_samples=16, window_blocks=64),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_each_sample_of_a_batch_has_one_process(order: Order, processes: int) -> None:
    for step in range(2 * order.steps_per_epoch):
        for lane in range(order.lanes):
            owned = [Share(number, processes).has_lane_batch(order, step, lane) for number in range(processes)]
            assert np.array_equal(np.sum(owned, axis=0), np.ones(order.lane_batch_size))


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_read_by_one_process_in_an_epoch(order: Order) -> None:
    readers: dict[tuple[int, int], set[int]] = {}
    for step in range(order.steps_per_epoch):
        for lane in range(order.lanes):
            blocks = order.block_of(order.lane_batch(step, lane))
            for number in range(3):
                for block in blocks[Share(number, 3).has_lane_batch(order, step, lane)].tolist():
                    readers.setdefault((lane, block), set()).add(number)

    assert {len(numbers) for numbers in readers.values()} == {1}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_of_a_window_no_process_has_two_blocks_more_than_another(order: Order, processes: int) -> None:
    for lane in range(order.lanes):
        for window in range(-(-order.epoch_blocks // order.window_blocks)):
            ids = order.window(0, lane, window)
            first = window * order.window_samples
            owned = [
                len(
                    np.unique(
                        order.block_of(ids[Share(number, processes).has_range(order, 0, lane, first, first + len(ids))])
                    )
                )
                for number in range(processes)
            ]
            assert max(owned) - min(owned) <= 1
            assert sum(owned) == len(np.unique(order.block_of(ids)))


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_remainders_of_lanes_go_to_different_processes(processes: int) -> None:
    order = ORDERS[1]  # four blocks a window
    counts = [
        sum(Share(number, processes).has_lane_batch(order, step, lane).sum() for lane in range(8) for step in range(70))
        for number in range(processes)
    ]

    assert sum(counts) == 70 * 64 and max(counts) < 1.2 * min(counts)


def test_a_share_does_not_depend_on_where_one_begins() -> None:
    order = ORDERS[1]
    whole = Share(1, 3).has_range(order, 1, 2, 0, 300)

    assert np.array_equal(Share(1, 3).has_range(order, 1, 2, 77, 300), whole[77:])
