"""Loader processes make what threads of the rank make, whatever happens to them."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import loader_faults
import numpy as np
import psutil
import pytest
import torch
from loader_faults import FatalDraws, FatalImages, LockedImages, loader_processes, servers

from pipeline.access.profile_keys import Keys
from pipeline.errors import DatasetError, LoaderProcessError, StalledError, UnreachableError
from pipeline.image.augment import RandomCrops
from pipeline.image.decode import decode
from pipeline.image.rand_augment import RandAugmented
from pipeline.ingest.writer import tar_url
from pipeline.load.batch import Batch
from pipeline.load.block_cache import CachePlace
from pipeline.load.chosen_samples import ChosenSamples
from pipeline.load.dataset import Dataset
from pipeline.load.image_maker import BadSamplePolicy
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage

ROOT = Path(__file__).parents[4]
ORDER = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)
SKIP = BadSamplePolicy("skip")
STEPS = 17
"""Three epochs and a bit."""
STALL_SECONDS = 15.0
"""More than the imports of a fork server take."""


def loader(dataset: Dataset, **changes: Any) -> Loader:
    options: dict[str, Any] = {"image_shape": (16, 16), "rank": 0, "world_size": 1, "seed": 5, "threads": 2}
    options |= {"in_processes": True} | changes
    return Loader(dataset, options.pop("order", ORDER), **options)


def batches(dataset: Dataset, start: int = 0, stop: int = STEPS, **changes: Any) -> list[Batch]:
    return list(loader(dataset, **changes).batches(start, stop))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [(batch.step, batch.epoch) for batch in found] == [(batch.step, batch.epoch) for batch in expected]
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.sample_ids, two.sample_ids)
        assert torch.equal(one.images, two.images)
        assert np.array_equal(one.crops, two.crops)
        assert one.substitutions == two.substitutions


def reopened(dataset: Dataset, storage: Storage | None = None, **options: Any) -> Dataset:
    return Dataset(storage or dataset.storage, dataset.url, dataset.manifest, **options)


@pytest.fixture(scope="module")
def by_threads(dataset: Dataset) -> list[Batch]:
    return batches(dataset, in_processes=False)


# ---- the same as by threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "world_size", "processes"), [(0, 1, 1), (0, 1, 3), (0, 2, 2), (1, 2, 2), (4, 5, 2)])
def test_every_rank_gets_the_same_batches(
    dataset: Dataset, by_threads: list[Batch], rank: int, world_size: int, processes: int
) -> None:
    options = {"rank": rank, "world_size": world_size}
    found = batches(dataset, threads=processes, **options)

    assert_same(found, batches(dataset, in_processes=False, **options))
    if world_size == 1:
        assert_same(found, by_threads)


@pytest.mark.parametrize(
    "changes", [{"prefetch_batches": 0}, {"prefetch_batches": 9}, {"open_bytes": 0}, {"threads": 7}]
)
def test_slots_memory_and_processes_change_nothing(
    dataset: Dataset, by_threads: list[Batch], changes: dict[str, int]
) -> None:
    assert_same(batches(dataset, **changes), by_threads)


@pytest.mark.parametrize("start", [1, 4, 5, 16])
def test_a_run_resumed_at_any_step_continues_alike(dataset: Dataset, by_threads: list[Batch], start: int) -> None:
    assert_same(batches(dataset, start), by_threads[start:])


def test_images_whose_size_changes_with_the_epoch_share_one_ring(dataset: Dataset) -> None:
    growing = {0: (16, 16), 1: (24, 40), 3: (8, 8)}
    found = batches(dataset, image_shape=growing)

    assert {batch.epoch: tuple(batch.images.shape[2:]) for batch in found} == {**growing, 2: (24, 40)}
    assert_same(found, batches(dataset, image_shape=growing, in_processes=False))


def test_steps_of_no_length_start_nothing(dataset: Dataset) -> None:
    assert batches(dataset, 3, 3) == [] and not servers()


def test_nothing_is_read_twice_and_all_reads_are_counted(dataset: Dataset) -> None:
    counts = []
    for in_processes in (False, True):
        counted = reopened(dataset)
        batches(counted, 0, 3 * ORDER.steps_per_epoch, in_processes=in_processes)
        counts.append(counted.counters.read())

    assert counts[0] == counts[1] and counts[1].requests > 0


def test_a_disk_cache_serves_all_processes(dataset: Dataset, by_threads: list[Batch], tmp_path: Path) -> None:
    place = CachePlace(str(tmp_path), 10**9)
    assert_same(batches(reopened(dataset, cache=place)), by_threads)

    again = reopened(dataset, cache=place)
    assert_same(batches(again, 5), by_threads[5:])
    counts = again.counters.read()
    assert counts.requests == 0 and counts.cache_hits > 0


def test_a_fine_tunings_samples_and_augmentation_are_the_same(dataset: Dataset) -> None:
    ids = np.flatnonzero(np.arange(61) % 3 > 0)
    order = Order(len(ids), global_batch_size=6, lanes=3, seed=5, block_samples=3, window_blocks=2)
    options = {"order": order, "augmentation": RandAugmented(RandomCrops((0.08, 1.0)), 2, 9.0)}

    found = [batches(ChosenSamples(reopened(dataset), ids), 0, 9, in_processes=on, **options) for on in (False, True)]

    assert_same(*found)


def flip_byte(dataset: Dataset, sample: int) -> None:
    (row,) = dataset.rows([sample])
    path = Path(tar_url(dataset.url, dataset.manifest.shards[row.shard].name))
    data = bytearray(path.read_bytes())
    data[row.row.offset + 100] ^= 1
    path.write_bytes(data)


def remove_shard(dataset: Dataset, sample: int) -> None:
    Path(tar_url(dataset.url, dataset.manifest.shards[dataset.rows([sample])[0].shard].name)).unlink()


@pytest.mark.parametrize("damage", [flip_byte, remove_shard])
def test_bad_samples_are_named_or_replaced_alike(own_dataset: Dataset, damage: Callable[[Dataset, int], None]) -> None:
    damage(own_dataset, 30)
    expected = batches(reopened(own_dataset), policy=SKIP, in_processes=False)
    with pytest.raises(DatasetError) as by_threads:
        batches(reopened(own_dataset), in_processes=False, threads=1)

    assert any(batch.substitutions for batch in expected)
    assert_same(batches(reopened(own_dataset), policy=SKIP), expected)
    with pytest.raises(DatasetError) as by_processes:
        batches(reopened(own_dataset), threads=1)
    assert str(by_processes.value) == str(by_threads.value)
    assert not servers()


def test_too_many_bad_samples_in_a_row_end_it_alike(own_dataset: Dataset) -> None:
    for shard in own_dataset.manifest.shards:
        Path(tar_url(own_dataset.url, shard.name)).unlink()

    with pytest.raises(DatasetError, match="at most 3 samples in a row"):
        batches(own_dataset, policy=BadSamplePolicy("skip", 3))


def test_an_error_of_the_store_is_raised_by_its_name(dataset: Dataset) -> None:
    with pytest.raises(UnreachableError, match=r"storage: must answer, got '.*shard-00000\d.*'; start it") as caught:
        batches(reopened(dataset, loader_faults.UnreachableStorage()))

    assert any("read_range" in note for note in caught.value.__notes__)


def test_keys_come_from_the_rank(dataset: Dataset) -> None:
    rank = os.getpid()
    storage = loader_faults.AskingStorage(renewal=lambda: Keys(f"key of {rank}", "secret", None))

    with pytest.raises(UnreachableError, match=f"keys are key of {rank}"):
        batches(reopened(dataset, storage))


def test_what_a_process_logs_is_logged_by_the_rank(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    cached = reopened(dataset, cache=CachePlace(str(folder), 10**9))
    (folder / "used").unlink()
    (folder / "used").mkdir()  # no number can be noted there

    batches(cached, threads=1)

    (record,) = {record.getMessage(): record for record in caplog.records if "no more blocks" in record.msg}.values()
    assert record.name == "pipeline.load.block_cache" and record.process != os.getpid()
    assert cached.cache and not cached.cache.storing


# ---- deaths --------------------------------------------------------------------------------------------------------


def others_than(dead: set[int], count: int) -> list[psutil.Process]:
    """As many processes as there should be, none of them dead."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [process for process in loader_processes() if process.pid not in dead]
        if len(found) == count:
            return found
        time.sleep(0.005)
    raise AssertionError("no other process came")


def test_a_process_that_is_killed_is_replaced_within_a_second_and_no_pixel_differs(
    dataset: Dataset, by_threads: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    slow = reopened(dataset, loader_faults.SlowStorage())
    found, seconds, dead = [], [], set[int]()
    chance = random.Random(0)
    for batch in loader(slow, prefetch_batches=1).batches(0, STEPS):
        found.append(batch)
        if batch.step % 3 == 1 and batch.step < STEPS - 4:
            victim = chance.choice(others_than(dead, 2))
            dead.add(victim.pid)
            began = time.monotonic()
            victim.kill()
            others_than(dead, 2)
            seconds.append(time.monotonic() - began)

    assert_same(found, by_threads)
    assert len(seconds) == 4 and max(seconds) < 1.0
    messages = [record.getMessage() for record in caplog.records if "replaced it" in record.msg]
    assert len(messages) == 4 and all("was killed by SIGKILL" in message for message in messages)


def test_deaths_at_any_moment_change_nothing(dataset: Dataset, by_threads: list[Batch]) -> None:
    chance, found = random.Random(1), []
    killing = subprocess.Popen([sys.executable, "-c", _KILLER, str(os.getpid())], env=_environment())
    try:
        for batch in loader(reopened(dataset, loader_faults.SlowStorage())).batches(0, STEPS):
            found.append(batch)
            time.sleep(0.2 * chance.random())
    finally:
        killing.kill()
        killing.wait()

    assert_same(found, by_threads)


_KILLER = """
import random, sys, time
from loader_faults import loader_processes
while True:
    time.sleep(random.uniform(0.1, 0.5))
    for process in random.sample(found := loader_processes(int(sys.argv[1])), min(1, len(found))):
        process.kill()
"""


def test_a_fork_server_that_is_killed_is_replaced_too(dataset: Dataset, by_threads: list[Batch]) -> None:
    found = []
    for batch in loader(dataset, prefetch_batches=0).batches(0, STEPS):
        found.append(batch)
        if batch.step in (3, 9):
            (server,) = servers()
            server.kill()

    assert_same(found, by_threads)


def sizes(dataset: Dataset) -> dict[int, tuple[int, int]]:
    """Height and width of each sample."""
    return {sample.id: decode(sample.data).shape[:2] for sample in dataset.read(range(61))}


def fatal(dataset: Dataset, folder: Path) -> tuple[FatalImages, set[int]]:
    """Crops that end a process at some samples, and which."""
    folder.mkdir()
    found = sizes(dataset)
    size = found[30]
    return FatalImages(size=size, deaths=str(folder)), {sample for sample, other in found.items() if other == size}


def test_a_sample_that_ends_its_process_again_and_again_counts_as_one_that_does_not_decode(
    dataset: Dataset, by_threads: list[Batch], tmp_path: Path
) -> None:
    augmentation, culprits = fatal(dataset, tmp_path / "deaths")

    found = batches(dataset, policy=SKIP, augmentation=augmentation, threads=1)

    bad = {item.bad.id: item.bad for batch in found for item in batch.substitutions}
    assert culprits and set(bad) == culprits
    for item in bad.values():
        assert item.fault == "undecodable" and "does not decode (3 processes died of it)" in item.reason
    assert len(list((tmp_path / "deaths").iterdir())) == 3 * len(culprits)
    for one, two in zip(found, by_threads, strict=True):
        whole = ~np.isin(one.sample_ids.numpy(), list(culprits))
        assert torch.equal(one.images[whole], two.images[whole])


def test_such_a_sample_ends_a_run_that_does_not_skip_and_is_named(dataset: Dataset, tmp_path: Path) -> None:
    augmentation, culprits = fatal(dataset, tmp_path / "deaths")

    with pytest.raises(
        DatasetError, match=r"000000\d\d.jpg at offset \d+ does not decode \(3 processes died"
    ) as caught:
        batches(dataset, augmentation=augmentation)
    assert any(f"{sample:08d}" in str(caught.value) for sample in culprits)


def test_processes_that_die_before_they_have_made_anything_end_it(dataset: Dataset) -> None:
    with pytest.raises(LoaderProcessError, match=r"5 loader processes died in a row; .*ended with exit code 7"):
        batches(dataset, augmentation=FatalDraws(), threads=1)
    assert not servers()


# ---- stalls --------------------------------------------------------------------------------------------------------


def stalled(dataset: Dataset, **changes: Any) -> str:
    with pytest.raises(StalledError) as caught:
        batches(dataset, stall_seconds=STALL_SECONDS, **changes)
    assert not servers()
    return str(caught.value)


def test_a_read_that_hangs_is_reported_with_shard_image_and_offset(
    dataset: Dataset, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.load.processes.loader_processes.END_SECONDS", 0.5)
    message = stalled(reopened(dataset, loader_faults.HangingStorage()))

    assert "stage read" in message
    assert "shard-000002.tar" in message and ".jpg" in message and "offset" in message
    assert "in read_range" in capfd.readouterr().err


@pytest.mark.slow
def test_a_decoder_that_never_lets_go_of_the_lock_is_reported_by_its_sample(
    dataset: Dataset, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.load.processes.loader_processes.END_SECONDS", 0.5)
    size = sizes(dataset)[int(ORDER.batch(0)[-1])]
    # Of each process's images the last one: none is left that it would have to read, for which it lacks the lock, too.
    message = stalled(dataset, augmentation=LockedImages(size=size), prefetch_batches=0)

    assert "stage decode" in message
    named = [sample for sample, other in sizes(dataset).items() if other == size]
    assert any(f"{sample:08d}.jpg at offset" in message for sample in named)
    assert "loader_faults.py" in capfd.readouterr().err


@pytest.mark.slow
def test_a_process_that_was_stopped_is_reported(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.load.processes.loader_processes.END_SECONDS", 0.5)
    generator = loader(dataset, stall_seconds=STALL_SECONDS, prefetch_batches=0).batches(0, STEPS)
    next(generator)
    for process in loader_processes():
        process.send_signal(signal.SIGSTOP)

    with pytest.raises(StalledError, match=r"step 1 hangs in stage read; 12 of its images are not there"):
        next(generator)
    assert not servers()


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_a_consumer_that_stops_early_leaves_no_process_and_no_handle(dataset: Dataset) -> None:
    def handles() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = handles()
    generator = loader(dataset).batches(0, 1000)
    next(generator)
    left = [*servers(), *loader_processes()]
    assert len(left) == 3

    generator.close()

    assert all(loader_faults.is_gone(process.pid) for process in left)
    assert handles() <= before


_RANK = """
import sys, time
from loader_faults import LockedImages
from pipeline.load.dataset import Dataset
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage

dataset = Dataset.open(Storage(), sys.argv[1])
order = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)
size = tuple(map(int, sys.argv[2:]))
loader = Loader(dataset, order, image_shape=(16, 16), rank=0, world_size=1, seed=5, threads=2, in_processes=True,
                augmentation=LockedImages(size=size))
for batch in loader.batches(0, 10**6):
    print(batch.step, flush=True)
    time.sleep(0.05)
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


@pytest.mark.parametrize(
    ("ends", "hangs"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False), (signal.SIGINT, True)],
)
def test_processes_end_with_their_rank_however_it_ends(dataset: Dataset, ends: signal.Signals, hangs: bool) -> None:
    # A process that hangs with the interpreter's lock cannot see that its line has ended.
    found = sizes(dataset)
    late = next(size for sample, size in found.items() if size not in {found[i] for i in ORDER.batch(0).tolist()})
    size = late if hangs else (0, 0)
    command = [sys.executable, "-c", _RANK, dataset.url, *map(str, size)]
    rank = subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert rank.stdout and rank.stdout.readline() == "0\n"
    if hangs:
        time.sleep(2.0)
    left = [*servers(rank.pid), *loader_processes(rank.pid)]
    assert len(left) == 3

    rank.send_signal(ends)
    rank.wait(20)

    deadline = time.monotonic() + 2
    while not all(loader_faults.is_gone(process.pid) for process in left):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_is_that_of_the_ring_and_does_not_grow(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.load.processes.loader_processes"):
        generator = loader(dataset, image_shape=(64, 64)).batches(0, 800)
        sums = []
        for batch in generator:
            if batch.step in (300, 799):  # pages that were shared with the server are copied for a while
                sums.append(sum(process.memory_full_info().uss for process in loader_processes()))

    slot = 12 * 3 * 64 * 64
    (size,) = [int(str(record.args[1])) for record in caplog.records if record.args and "share a ring" in record.msg]  # type: ignore[index]
    assert 3 * slot < size < 3 * (slot + 8192) + 2 * 8 * 1024
    assert sums[1] - sums[0] < 15e6, "the images of these batches are 74 MB"


def test_a_dataset_is_opened_elsewhere_as_it_is_here(dataset: Dataset, tmp_path: Path) -> None:
    here = reopened(dataset, cache=CachePlace(str(tmp_path), 10**6), check_etags=False)

    there = here.opener()(replace(here.storage, retry_seconds=1.0))

    assert (there.url, there.digest, there.samples) == (here.url, here.digest, here.samples)
    assert there.storage.retry_seconds == 1.0 and there.cache is not None and there.counters is not here.counters
