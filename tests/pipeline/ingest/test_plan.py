from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.access.places import Given
from pipeline.errors import SourceError
from pipeline.image.photo import Encoding
from pipeline.ingest.plan import Ingest, Sharding, plan_shards
from pipeline.ingest.source import Source, Sources
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.store.storage import Storage


def found(count: int, size_bytes: int = 1000) -> Sources:
    return Sources("/photos", (), tuple(Source(Given(f"{n}.jpg"), size_bytes, None) for n in range(count)))


def test_a_plan_uses_every_source_once_in_an_order_of_its_seed(photographs: Path) -> None:
    sources = find_sources(Storage(), str(photographs))
    assert isinstance(sources, Sources)
    plans = [list(plan_shards(sources, Sharding(20, seed=seed))) for seed in (0, 0, 1)]

    assert plans[0] == plans[1] != plans[2]
    assert [len(task.sources) for task in plans[0]] == [20, 20, 20, 1]
    assert [task.first_key for task in plans[0]] == [0, 20, 40, 60]
    used = [source for task in plans[0] for source in task.sources]
    assert used != list(sources.images)
    assert sorted(used, key=lambda source: source.path) == list(sources.images)


def test_neighbours_of_one_class_are_dealt_to_all_shards() -> None:
    sources = Sources("", (), tuple(Source(Given(f"{n}"), 1, n // 100) for n in range(1000)))

    for task in plan_shards(sources, Sharding(100)):
        counts = np.bincount([source.label or 0 for source in task.sources], minlength=10)
        assert counts.max() < 30


def test_names_sort_as_numbers_do() -> None:
    one_image = found(1).images[0]
    plan = plan_shards(Sources("/photos", (), (one_image,) * 1_000_001), Sharding(1))

    assert (plan[0].name, plan[1_000_000].name) == ("shard-0000000", "shard-1000000")
    assert plan[-1] == plan[len(plan) - 1]


@pytest.mark.parametrize("shard_bytes", [20_480, 60_000, 100_000])
def test_shards_cut_by_bytes_are_filled_and_never_larger(shard_bytes: int, photographs: Path, tmp_path: Path) -> None:
    sources = find_sources(Storage(), str(photographs))
    assert isinstance(sources, Sources)
    plan = plan_shards(sources, Sharding(shard_bytes=shard_bytes))

    reports = [write_shard(Storage(), str(tmp_path), task) for task in plan]

    assert sum(report.samples for report in reports) == len(sources.images)
    assert max(report.tar_bytes for report in reports) <= shard_bytes
    assert min(report.tar_bytes for report in reports[:-1]) >= shard_bytes - 20_480


def test_an_image_larger_than_a_shard_has_one_for_itself() -> None:
    plan = plan_shards(found(5, 10**6), Sharding(shard_bytes=1000))

    assert [len(task.sources) for task in plan] == [1] * 5


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "shard size"),
        ({"samples_per_shard": 5, "shard_bytes": 5}, "shard size"),
        ({"samples_per_shard": 0}, "samples_per_shard"),
        ({"shard_bytes": 0}, "shard_bytes"),
    ],
)
def test_shards_without_one_size_are_refused(options: dict[str, int], field: str) -> None:
    with pytest.raises(SourceError) as caught:
        Sharding(**options)
    assert caught.value.field == field


def test_every_option_makes_another_data_set() -> None:
    shardings = [
        Sharding(5),
        Sharding(6),
        Sharding(shard_bytes=5),
        Sharding(5, seed=1),
        Sharding(5, encoding=Encoding(max_side=100)),
        Sharding(5, encoding=Encoding(quality=80)),
        Sharding(5, encoding=Encoding(restart_markers=True)),
    ]
    digests = {Ingest(found(10), sharding).digest for sharding in shardings}

    assert len(digests) == 7
    assert Ingest(found(10), Sharding(5)).digest in digests
    assert Ingest(found(11), Sharding(5)).digest not in digests
    assert Ingest(found(10, 999), Sharding(5)).digest not in digests


def test_tasks_of_another_encoding_are_not_kept() -> None:
    plans = [plan_shards(found(5), Sharding(5, encoding=Encoding(quality=quality))) for quality in (None, 80)]

    assert plans[0][0].digest != plans[1][0].digest


def test_shards_without_markers_are_those_of_releases_that_knew_none() -> None:
    job = Ingest(found(10), Sharding(5, encoding=Encoding(max_side=100)))

    (task,) = plan_shards(found(5), Sharding(5))
    assert task.digest == "a82e7e39fad4fad9ce4a2480d1692a1f4f7edd827ba688389032a4647d90dab2"
    assert job.digest == "88ca7049a9d47f7a83f75235b179fbe1abf6c348bf567393e3cd57a5230f2361"
