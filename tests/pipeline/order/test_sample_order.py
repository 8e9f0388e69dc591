from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import OrderError
from pipeline.order.sample_order import ConsumedDigest, Order, _window_samples


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.integers(1, 12))
    batch = lanes * draw(st.integers(1, 5))
    return Order(
        draw(st.integers(batch, batch + 300)),
        global_batch_size=batch,
        lanes=lanes,
        seed=draw(st.integers(0, 1000)),
        block_samples=draw(st.integers(1, 40)),
        window_blocks=draw(st.integers(1, 9)),
    )


def epoch_samples(order: Order, epoch: int) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    return np.concatenate([order.batch(step) for step in range(first, first + order.steps_per_epoch)])


@settings(max_examples=40, deadline=None)
@given(order=orders(), epoch=st.integers(0, 3))
def test_an_epoch_uses_each_sample_at_most_once_and_drops_little(order: Order, epoch: int) -> None:
    samples = epoch_samples(order, epoch)

    assert len(np.unique(samples)) == len(samples)
    assert samples.min() >= 0 and samples.max() < order.samples
    assert order.steps_per_epoch >= 0.99 * (order.samples // order.global_batch_size)


@settings(max_examples=40, deadline=None)
@given(order=orders(), step=st.integers(0, 60), data=st.data())
def test_ranks_share_the_same_batch_at_every_world_size(order: Order, step: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, order.lanes))
    shares = [order.rank_batch(step, rank, world_size) for rank in range(world_size)]

    assert np.array_equal(np.concatenate(shares), order.batch(step))
    assert len(order.batch(step)) == order.global_batch_size
    lanes = [len(order.rank_lanes(rank, world_size)) for rank in range(world_size)]
    assert sum(lanes) == order.lanes and max(lanes) - min(lanes) <= 1


@settings(max_examples=40, deadline=None)
@given(order=orders(), world_size=st.integers(1, 12), lane=st.integers(0, 11))
def test_a_lane_belongs_to_the_rank_of_the_formula(order: Order, world_size: int, lane: int) -> None:
    world_size, lane = min(world_size, order.lanes), min(lane, order.lanes - 1)

    assert lane in order.rank_lanes(lane * world_size // order.lanes, world_size)


@settings(max_examples=15, deadline=None)
@given(order=orders())
def test_lanes_keep_their_blocks_permanently_and_share_none(order: Order) -> None:
    before: dict[int, set[int]] = {}
    for epoch in (0, 5):
        owners: dict[int, set[int]] = {}
        for lane in range(order.lanes):
            samples = order.lane_range(epoch, lane, 0, order.steps_per_epoch * order.lane_batch_size)
            for block in np.unique(order.block_of(samples)).tolist():
                owners.setdefault(block, set()).add(lane)
        assert all(len(lanes) == 1 for lanes in owners.values())
        if before:
            assert all(before.get(block, lanes) == lanes for block, lanes in owners.items())
        before = owners


@settings(max_examples=40, deadline=None)
@given(order=orders())
def test_blocks_cut_the_samples_without_gap(order: Order) -> None:
    samples = np.arange(order.samples)
    starts = order.block_start(np.arange(order.blocks + 1))

    assert starts[0] == 0 and starts[-1] == order.samples
    assert set(np.diff(starts)) <= {order.used_block_samples, order.used_block_samples + 1}
    assert np.array_equal(order.block_of(samples), np.searchsorted(starts, samples, side="right") - 1)


@settings(max_examples=25, deadline=None)
@given(order=orders(), epoch=st.integers(0, 3), lane=st.integers(0, 11))
def test_an_epoch_omits_whole_blocks_and_less_than_one_block_of_others(order: Order, epoch: int, lane: int) -> None:
    used = order.steps_per_epoch * order.lane_batch_size
    samples = order.lane_range(epoch, min(lane, order.lanes - 1), 0, used)

    opened = np.unique(order.block_of(samples)).size * order.used_block_samples

    assert opened <= order.epoch_blocks * order.used_block_samples < used + order.used_block_samples


@pytest.mark.parametrize("samples", [500, 517])
@pytest.mark.parametrize(
    ("batch", "lanes", "block", "window"), [(24, 6, 8, 3), (24, 24, 1, 1), (21, 3, 40, 2), (10, 1, 9, 99)]
)
def test_any_step_is_reached_without_the_steps_before(
    samples: int, batch: int, lanes: int, block: int, window: int
) -> None:
    order = Order(samples, batch, lanes, 1, block, window)
    straight = [order.batch(step) for step in range(2 * order.steps_per_epoch + 3)]

    for step in reversed(range(len(straight))):
        _window_samples.cache_clear()  # nothing is left of other steps
        assert np.array_equal(pickle.loads(pickle.dumps(order)).batch(step), straight[step])


@settings(max_examples=40, deadline=None)
@given(order=orders(), epoch=st.integers(0, 3))
def test_lanes_give_alike_to_every_step(order: Order, epoch: int) -> None:
    step = epoch * order.steps_per_epoch
    batches = order.batch(step).reshape(order.lanes, order.lane_batch_size)

    for lane in range(order.lanes):
        assert np.array_equal(batches[lane], order.lane_batch(step, lane))
    blocks = [order.lane_blocks(lane) for lane in range(order.lanes)]
    assert sum(blocks) == order.blocks and max(blocks) - min(blocks) <= 1


@settings(max_examples=12, deadline=None)
@given(order=orders())
def test_no_sample_is_dropped_in_every_epoch(order: Order) -> None:
    used = np.zeros(order.samples, bool)
    epochs = 0
    while epochs <= 80 and not used.all():
        used[epoch_samples(order, epochs)] = True
        epochs += 1

    assert epochs <= 80


def test_every_sample_is_used_within_a_few_epochs() -> None:
    order = Order(515, global_batch_size=48, lanes=6, seed=1, block_samples=8)
    seen = np.unique(np.concatenate([epoch_samples(order, epoch) for epoch in range(25)]))

    assert len(epoch_samples(order, 0)) < 515
    assert np.array_equal(seen, np.arange(515))


def test_epochs_and_seeds_differ() -> None:
    order = Order(400, global_batch_size=16, lanes=4, seed=1)
    other = Order(400, global_batch_size=16, lanes=4, seed=2)

    assert not np.array_equal(epoch_samples(order, 0), epoch_samples(order, 1))
    assert not np.array_equal(epoch_samples(order, 0), epoch_samples(other, 0))


def test_a_plan_over_two_thousand_million_samples_is_small() -> None:
    order = Order(2 * 10**9, global_batch_size=4096, lanes=64, seed=0)

    tracemalloc.start()
    ids = order.batch(123_456_789)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(np.unique(ids)) == 4096
    assert peak_bytes < 16 << 20


def test_a_batch_mixes_shards_like_independent_draws_but_for_its_blocks() -> None:
    order = Order(1_281_167, global_batch_size=4096, lanes=64, seed=0, block_samples=16, window_blocks=256)
    shards = 128
    counts = np.bincount(order.batch(40) * shards // order.samples, minlength=shards)

    expected = 4096 / shards
    assert ((counts - expected) ** 2 / expected).sum() / (shards - 1) < 2.0


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"lanes": 7}, "lanes"), ({"samples": 11}, "samples"), ({"window_blocks": 0}, "window_blocks")],
)
def test_impossible_numbers_are_refused_by_name(changes: dict[str, int], field: str) -> None:
    numbers = {"samples": 100, "global_batch_size": 12, "lanes": 6, "seed": 0} | changes

    with pytest.raises(OrderError) as caught:
        Order(**numbers)
    assert caught.value.field == field


def test_more_ranks_than_lanes_are_refused() -> None:
    with pytest.raises(OrderError, match="world_size"):
        Order(100, global_batch_size=12, lanes=6, seed=0).rank_lanes(0, 7)


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 10**9), max_size=30), data=st.data())
def test_consumed_digest_ignores_order_and_grouping_but_nothing_else(ids: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(ids))
    cut = data.draw(st.integers(0, len(ids)))
    whole = ConsumedDigest.of(np.array(ids, np.int64))
    parts = ConsumedDigest.of(np.array(shuffled[:cut], np.int64)) + ConsumedDigest.of(
        np.array(shuffled[cut:], np.int64)
    )

    assert whole == parts
    assert whole != ConsumedDigest.of(np.array([*ids, 5], np.int64))
    if ids:
        assert whole != ConsumedDigest.of(np.array([*ids[1:], ids[0] + 1], np.int64))
