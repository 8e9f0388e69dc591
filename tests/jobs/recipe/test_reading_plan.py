from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.recipe.reading_plan import ReadingPlan, inspected_dataset, listed_steps, usual_order
from pipeline.errors import OrderError
from pipeline.load.dataset import Dataset
from pipeline.order.sample_order import Order
from pipeline.shard.index import NO_LABEL, IndexRow, ShardIndex
from pipeline.shard.manifest import Manifest
from pipeline.shard.pixel_statistics import PixelStatistics
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage

SIZES = [300, 211, 89, 400]


def make_indexes(folder: Path, labels: np.ndarray | None = None) -> Dataset:
    """A data set without tars: reading an image fails."""
    entries, first = [], 0
    for shard, size in enumerate(SIZES):
        rows = [
            IndexRow(f"{shard}/{n}", 512, 9, 1, 2, 3, NO_LABEL if labels is None else int(labels[first + n]))
            for n in range(size)
        ]
        index = ShardIndex.from_rows(f"part-{shard}", 100 * size, "", (), rows)
        (folder / f"part-{shard}.index").write_bytes(index.to_bytes())
        entries.append(ShardEntry.of(index))
        first += size
    Manifest(2, "", (), 0, ShardTable.of(entries)).save(Storage(), str(folder), [])
    return Dataset.open(Storage(), str(folder))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_indexes(tmp_path)


ORDER = Order(1000, global_batch_size=24, lanes=6, seed=3, block_samples=16, window_blocks=4)


def listing(dataset: Dataset, step: int, steps: int, world_size: int) -> list[dict[str, Any]]:
    return list(listed_steps(dataset, ORDER, step, steps, world_size=world_size))


def test_each_step_and_rank_is_listed_with_the_keys_of_its_samples(dataset: Dataset) -> None:
    rows = listing(dataset, 39, 5, 4)

    assert [(row["step"], row["rank"]) for row in rows] == [(s, r) for s in range(39, 44) for r in range(4)]
    for row in rows:
        assert row["samples"] == ORDER.rank_batch(row["step"], row["rank"], 4).tolist()
        assert row["epoch"] == ORDER.epoch(row["step"]) and row["world_size"] == 4
        places = [
            (int(shard[5:]), int(key.split("/")[1])) for shard, key in zip(row["shards"], row["keys"], strict=True)
        ]
        assert [sum(SIZES[:shard]) + place for shard, place in places] == row["samples"]
        assert all(key.startswith(shard[5:] + "/") for shard, key in zip(row["shards"], row["keys"], strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 5, 6])
def test_every_world_size_lists_the_same_batches(dataset: Dataset, world_size: int) -> None:
    whole = {row["step"]: row["keys"] for row in listing(dataset, 0, 50, 1)}
    shared: dict[int, list[str]] = {}
    for row in listing(dataset, 0, 50, world_size):
        shared.setdefault(row["step"], []).extend(row["keys"])

    assert shared == whole


def test_one_rank_is_listed_alone(dataset: Dataset) -> None:
    rows = list(listed_steps(dataset, ORDER, 7, 2, world_size=4, rank=2))

    assert rows == [row for row in listing(dataset, 7, 2, 4) if row["rank"] == 2]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"step": -1}, "step"),
        ({"steps": 0}, "steps"),
        ({"rank": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"world_size": 7}, "world_size"),
        ({"world_size": 0}, "world_size"),
    ],
)
def test_what_cannot_be_listed_is_refused_before_anything_is(
    dataset: Dataset, arguments: dict[str, int], field: str
) -> None:
    with pytest.raises(OrderError) as caught:
        listed_steps(dataset, ORDER, **{"step": 0, "steps": 1, "world_size": 2} | arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("samples", "numbers", "expected"),
    [
        (1_281_167, {}, (4096, 256)),
        (1000, {}, (64, 8)),
        (3, {}, (1, 1)),
        (5000, {"batch": 96}, (96, 96)),
        (5000, {"batch": 1000}, (1000, 250)),
        (5000, {"batch": 96, "lanes": 12}, (96, 12)),
    ],
)
def test_a_data_set_is_planned_with_what_is_usual(
    samples: int, numbers: dict[str, int], expected: tuple[int, int]
) -> None:
    order = usual_order(samples, numbers)

    assert (order.global_batch_size, order.lanes) == expected


def test_a_data_set_is_inspected_in_numbers(dataset: Dataset, tmp_path: Path) -> None:
    numbers = {"batch": 24, "lanes": 6, "world": 4, "seed": 3, "block": 16, "window": 4}

    inspected = inspected_dataset(Storage(), str(tmp_path), numbers, labels=True)

    fields = inspected.to_json()
    assert (fields["samples"], fields["shards"], fields["bytes"]) == (1000, 4, 100_000)
    assert fields["digest"] == dataset.digest
    plan = fields["plan"]
    assert (plan["steps_per_epoch"], plan["dropped_per_epoch"]) == (ORDER.steps_per_epoch, 1000 - 41 * 24)
    assert plan["window_bytes"] == 100 * ORDER.window_samples
    assert plan["open_bytes_per_rank"] == 2 * plan["window_bytes"]
    assert plan["label_design_effect"] is None
    lines = dict(inspected.lines())
    assert lines["samples"] == "1,000"
    assert fields["pixels"] is None and lines["pixels"].startswith("never measured")
    assert lines["design effect"].startswith(f"{plan['design_effect']:.2f} over shards")


def test_a_data_set_is_said_to_have_the_pixels_that_were_measured(dataset: Dataset, tmp_path: Path) -> None:
    pixels = PixelStatistics(900, (0.5, 0.25), (0.125, 0.0625), 16)
    dataset.manifest.measured(pixels).marked().save(Storage(), str(tmp_path), [])

    inspected = inspected_dataset(Storage(), str(tmp_path), {"batch": 24, "lanes": 6}, labels=False)

    fields, lines = inspected.to_json(), dict(inspected.lines())
    assert fields["pixels"] == pixels.to_json() and fields["restart_markers"] is True
    assert lines["pixels"] == "2 channels of 16 bits, measured on 900 images"
    assert (lines["mean"], lines["deviation"]) == ("0.5000 0.2500", "0.1250 0.0625")
    assert "restart markers" in lines


def test_the_printed_design_effect_is_that_of_the_listed_keys(dataset: Dataset) -> None:
    plan = ReadingPlan.of(ORDER, dataset.manifest.shards.samples, 0, 1)
    effects = []
    for row in listing(dataset, 0, 10 * ORDER.steps_per_epoch, 1):
        counts = Counter(row["shards"])
        expected = [24 * size / 1000 for size in SIZES]
        observed = [counts[f"part-{shard}"] for shard in range(4)]
        effects.append(sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True)) / 3)

    assert np.mean(effects) == pytest.approx(plan.to_json()["design_effect"], rel=0.2)


def test_labels_are_said_to_mix_as_shards_do_if_they_are_sorted(tmp_path: Path) -> None:
    make_indexes(tmp_path, np.arange(1000) // 50)
    numbers = {"batch": 24, "lanes": 6, "seed": 3, "block": 16, "window": 4}

    plan = inspected_dataset(Storage(), str(tmp_path), numbers, labels=True).to_json()["plan"]

    labels = np.arange(1000) // 50
    effects = []
    for step in range(10 * ORDER.steps_per_epoch):
        counts = np.bincount(labels[ORDER.batch(step)], minlength=20)
        effects.append(((counts - 1.2) ** 2 / 1.2).sum() / 19)
    assert np.mean(effects) == pytest.approx(plan["label_design_effect"], rel=0.2)
