"""Every way in which a sample can be unusable, on a local dataset: named, or replaced by a pure function."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DatasetError
from pipeline.ingest.writer import tar_url
from pipeline.load import image_maker
from pipeline.load.batch import Batch
from pipeline.load.dataset import Dataset
from pipeline.load.image_maker import BadSamplePolicy
from pipeline.load.loader import Loader
from pipeline.load.shard_reader import _is_header
from pipeline.order.sample_order import ConsumedDigest, Order

ORDER = Order(61, global_batch_size=12, lanes=6, seed=5, block_samples=3, window_blocks=2)
SKIP = BadSamplePolicy("skip")
STEPS = 3 * ORDER.steps_per_epoch


def batches(dataset: Dataset, start: int = 0, stop: int = STEPS, **changes: Any) -> list[Batch]:
    options = {"image_shape": (16, 16), "rank": 0, "world_size": 1, "seed": 5, "threads": 2, "policy": SKIP} | changes
    return list(Loader(dataset, options.pop("order", ORDER), **options).batches(start, stop))


def change(dataset: Dataset, shard: int, edit: Callable[[bytearray], object]) -> None:
    """Rewrite the tar of a shard."""
    path = Path(tar_url(dataset.url, dataset.manifest.shards[shard].name))
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def flip(dataset: Dataset, sample: int, place: int) -> None:
    """Change one byte, `place` bytes after the begin of the image."""
    (row,) = dataset.rows([sample])

    def edit(data: bytearray) -> None:
        data[row.row.offset + place] ^= 1

    change(dataset, row.shard, edit)


def cut(dataset: Dataset, sample: int) -> None:
    """Let the tar end within the image."""
    (row,) = dataset.rows([sample])
    change(dataset, row.shard, lambda data: data.__delitem__(slice(row.row.offset + 10, None)))


def remove(dataset: Dataset, sample: int) -> None:
    """Delete the tar."""
    Path(tar_url(dataset.url, dataset.manifest.shards[dataset.rows([sample])[0].shard].name)).unlink()


def damage_index(dataset: Dataset, sample: int) -> None:
    """Delete the index."""
    shard = dataset.rows([sample])[0].shard
    Path(dataset.manifest.shards[shard].index_url(dataset.url)).unlink()


DAMAGES: list[tuple[Callable[[Dataset], object], str, str, set[int]]] = [
    (lambda dataset: flip(dataset, 30, 100), "checksum", "CRC32C", {30}),
    (lambda dataset: flip(dataset, 30, -400), "header", "tar header", {30}),
    (lambda dataset: flip(dataset, 30, -360), "header", "tar header", {30}),
    (lambda dataset: cut(dataset, 35), "truncated", "end early", {35, 36, 37, 38}),
    (lambda dataset: remove(dataset, 30), "missing", "missing", set(range(26, 39))),
    (lambda dataset: damage_index(dataset, 30), "index", "missing", set(range(26, 39))),
]


@pytest.mark.parametrize(("damage", "fault", "says", "bad"), DAMAGES)
def test_it_is_reported_by_name_or_replaced_and_reported(
    own_dataset: Dataset, damage: Callable[[Dataset], object], fault: str, says: str, bad: set[int]
) -> None:
    whole = batches(own_dataset)
    damage(own_dataset)
    fresh = Dataset.open(own_dataset.storage, own_dataset.url)

    with pytest.raises(DatasetError, match=says) as caught:
        batches(fresh, policy=BadSamplePolicy("fail"))
    if fault != "index":
        assert all(word in str(caught.value) for word in ("shard-000002.tar", ".jpg", "offset", "on_bad_sample=skip"))

    replaced = batches(fresh)
    for before, after in zip(whole, replaced, strict=True):
        assert torch.equal(before.sample_ids, after.sample_ids)
        reported = {item.bad.id for item in after.substitutions}
        assert reported == bad & set(before.sample_ids.tolist())
        for sample, one, other in zip(before.sample_ids.tolist(), before.images, after.images, strict=True):
            assert torch.equal(one, other) != (sample in reported)
    assert {item.bad.fault for batch in replaced for item in batch.substitutions} == {fault}


def substitutions(found: list[Batch]) -> list[list[tuple[int, int]]]:
    return [[(item.bad.id, item.substitute) for item in batch.substitutions] for batch in found]


@pytest.fixture
def damaged(own_dataset: Dataset) -> Dataset:
    """A flipped byte, a header, and a tar that is missing: blocks that are bad in part, and as a whole."""
    flip(own_dataset, 5, 200)
    flip(own_dataset, 6, -300)
    remove(own_dataset, 30)
    return Dataset.open(own_dataset.storage, own_dataset.url)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_substitutes_are_the_same_at_every_world_size(damaged: Dataset, world_size: int) -> None:
    whole = batches(damaged)
    ranks = [batches(damaged, rank=rank, world_size=world_size, threads=1 + rank) for rank in range(world_size)]

    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), batch.images)
        assert [pair for rank in ranks for pair in substitutions(rank)[step]] == substitutions(whole)[step]


@pytest.mark.parametrize("start", range(0, STEPS, 2))
def test_substitutes_are_the_same_after_a_resume(damaged: Dataset, start: int) -> None:
    whole = batches(damaged)

    resumed = batches(Dataset.open(damaged.storage, damaged.url), start)

    assert substitutions(resumed) == substitutions(whole)[start:]
    assert all(torch.equal(one.images, two.images) for one, two in zip(resumed, whole[start:], strict=True))


def test_a_substitute_is_good_and_of_the_same_block_where_the_block_has_a_good_sample(damaged: Dataset) -> None:
    bad = {5, 6, *range(26, 39)}
    blocks = ORDER.block_of

    found = [pair for step in substitutions(batches(damaged)) for pair in step]

    assert {sample for sample, _ in found} == bad
    for sample, substitute in found:
        assert substitute not in bad
        block = ORDER.block_range(int(blocks(np.array([sample]))[0]))
        assert substitute in block or set(block) <= bad


def test_the_digest_is_that_of_the_order(own_dataset: Dataset) -> None:
    def digest(found: list[Batch]) -> ConsumedDigest:
        return sum((ConsumedDigest.of(batch.sample_ids.numpy()) for batch in found), ConsumedDigest())

    before = digest(batches(own_dataset))
    flip(own_dataset, 30, 100)

    assert digest(batches(own_dataset)) == before


def test_an_image_that_does_not_decode_is_replaced(own_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = own_dataset.read([30])[0].data
    decode = image_maker.decode

    def refuse(data: bytes, channels: int, bits: int) -> Any:
        if data == broken:
            raise ValueError("Premature end of JPEG file")
        return decode(data, channels, bits)

    monkeypatch.setattr(image_maker, "decode", refuse)
    found = [item for batch in batches(own_dataset) for item in batch.substitutions]

    assert {(item.bad.id, item.bad.fault) for item in found} == {(30, "undecodable")}
    assert len(found) <= 3
    with pytest.raises(DatasetError, match=r"shard-000002.*00000030\.jpg at offset \d+.*Premature end"):
        batches(own_dataset, policy=BadSamplePolicy("fail"))


def test_what_a_second_read_brings_whole_is_not_bad(own_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that is damaged on the way, once."""
    storage, seen = type(own_dataset.storage), []
    read_range = storage.read_range

    def flaky(self: Any, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        data = bytearray(read_range(self, url, offset, length, etag))
        if url.endswith("shard-000001.tar") and not seen:
            seen.append(url)
            data[600] ^= 1
        return bytes(data)

    whole = batches(own_dataset)
    monkeypatch.setattr(storage, "read_range", flaky)
    found = batches(Dataset.open(own_dataset.storage, own_dataset.url))

    assert seen and not any(batch.substitutions for batch in found)
    assert all(torch.equal(one.images, two.images) for one, two in zip(found, whole, strict=True))


@pytest.mark.parametrize("world_size", [1, 3])
def test_too_many_in_a_row_stop_the_run_at_the_same_step_at_every_world_size(damaged: Dataset, world_size: int) -> None:
    """Sample ids 26 to 38 are missing; some lane draws two of them in a row soon."""
    lanes: dict[int, int] = {}
    expected = None
    for step in range(STEPS):
        for lane in range(ORDER.lanes):
            for sample in ORDER.lane_batch(step, lane).tolist():
                lanes[lane] = lanes.get(lane, 0) + 1 if sample in {5, 6, *range(26, 39)} else 0
                expected = step if expected is None and lanes[lane] > 2 else expected
    assert expected is not None

    policy = BadSamplePolicy("skip", max_consecutive=2)
    ended = []
    for rank in range(world_size):
        loader = Loader(
            damaged, ORDER, image_shape=(16, 16), rank=rank, world_size=world_size, seed=5, threads=2, policy=policy
        )
        generator, step = loader.batches(0, expected + 1), 0
        try:
            for batch in generator:
                step = batch.step + 1
        except DatasetError as error:
            assert "max_consecutive_bad_samples" in str(error) and "convmae verify" in str(error)
            ended.append(step)
    assert ended == [expected]


def test_a_data_set_without_a_good_sample_stops_at_once(own_dataset: Dataset) -> None:
    for shard in range(5):
        Path(tar_url(own_dataset.url, own_dataset.manifest.shards[shard].name)).unlink()

    with pytest.raises(DatasetError, match="max_consecutive_bad_samples"):
        batches(own_dataset, stop=1, policy=BadSamplePolicy("skip", max_consecutive=4))


def test_headers_of_every_tar_format_are_known(tmp_path: Path) -> None:
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for name in ("a.jpg", "x/" * 60 + "a.jpg", "\u00fc\u4e2d.jpg"):
            member = tarfile.TarInfo(name)
            member.size, member.uid = 3, 0 if kind == tarfile.USTAR_FORMAT else 2**31
            output = io.BytesIO()
            with tarfile.open(fileobj=output, mode="w", format=kind) as tar:
                tar.addfile(member, io.BytesIO(b"abc"))
            with tarfile.open(fileobj=io.BytesIO(output.getvalue())) as tar:
                start = next(iter(tar)).offset_data
            header = output.getvalue()[start - 512 : start]
            assert _is_header(header)
            for place in range(0, 512, 7):
                assert not _is_header(header[:place] + bytes([header[place] ^ 4]) + header[place + 1 :])
    assert not _is_header(bytes(512)) and not _is_header(b"")
