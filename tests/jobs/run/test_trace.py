"""Traces: written, continued after restarts, read and compared."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patience import wait_until

from jobs.errors import TraceError
from jobs.run import trace as trace_module
from jobs.run.trace import PART_STEPS, TraceWriter, begin_trace, check_trace, differences, mask_digests, read_trace
from pipeline.load.batch import Batch
from pipeline.store.storage import Storage

BATCH = 12
STORAGE = Storage()
RUN = "s3://bucket/runs/first"


def batch(step: int, rank: int, world_size: int) -> Batch:
    """A rank's share of a batch that depends on the step alone."""
    ids = np.arange(BATCH)[rank * BATCH // world_size : (rank + 1) * BATCH // world_size] + 100 * step
    crops = np.stack([ids % 7, ids % 5, ids % 3 + 8, ids % 4 + 8, ids % 2], axis=1).astype(np.int32)
    images = torch.zeros(len(ids), 3, 1, 1, dtype=torch.uint8)
    return Batch(step, 0, torch.tensor(ids), images, 0.0, crops)


def masks(step: int, rank: int, world_size: int) -> torch.Tensor:
    ids = batch(step, rank, world_size).sample_ids
    return ((ids[:, None] >> torch.arange(11)) & 1).float()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "trace")


Train = Callable[..., None]


@pytest.fixture
def train(url: str) -> Iterator[Train]:
    """Writes the trace of some steps of an attempt; `killed` drops what was not written yet."""
    writers: list[TraceWriter] = []

    def steps(
        done: range, *, attempt: int = 1, world_size: int = 2, killed: bool = False, to: str = url, shift: int = 0
    ) -> None:
        begin_trace(STORAGE, to, RUN, done.start)
        for rank in range(world_size):
            writer = TraceWriter(STORAGE, to, rank=rank, world_size=world_size, attempt=attempt)
            writers.append(writer)
            for step in done:
                share = batch(step, rank, world_size)
                share.crops[:, 0] += shift
                for part in masks(step, rank, world_size).split(4):
                    writer.note_masks(part)
                writer.add(share, learning_rate=step / 10)
            if not killed:
                writer.flush()

    yield steps
    for writer in writers:
        writer.close()


def places(url: str) -> list[tuple[int, int, int]]:
    return [(row["step"], row["rank"], row["attempt"]) for row in read_trace(STORAGE, url)]


def raw_rows(url: str) -> list[dict[str, Any]]:
    """Every line that is there, as a reader without rules finds it."""
    return [json.loads(line) for path in Path(url).glob("*.jsonl") for line in path.read_text().splitlines()]


def test_a_row_records_what_a_rank_consumed(url: str, train: Train) -> None:
    train(range(2, 3))

    row = list(read_trace(STORAGE, url))[1]

    assert (row["step"], row["epoch"], row["rank"], row["world_size"], row["attempt"]) == (3, 0, 1, 2, 1)
    assert row["learning_rate"] == 0.2
    assert row["samples"] == [206, 207, 208, 209, 210, 211]
    assert row["crops"][0] == [206 % 7, 206 % 5, 206 % 3 + 8, 206 % 4 + 8]
    assert row["flips"] == [0, 1, 0, 1, 0, 1]
    assert row["masks"] == mask_digests(masks(2, 1, 2))


def test_a_mask_is_named_by_its_bits() -> None:
    (first, second) = mask_digests(torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0.0] * 10]))

    assert first == hashlib.blake2b(bytes([0b10000000, 0b11000000]), digest_size=8).hexdigest()
    assert second == hashlib.blake2b(bytes(2), digest_size=8).hexdigest()


def test_parts_are_written_on_the_way(url: str, train: Train) -> None:
    train(range(2 * PART_STEPS + 5), world_size=1)

    names = sorted(path.name for path in Path(url).glob("*.jsonl"))
    assert [name[5:22] for name in names] == ["00000001-00000100", "00000101-00000200", "00000201-00000205"]
    assert places(url) == [(step, 0, 1) for step in range(1, 2 * PART_STEPS + 6)]


def test_steps_that_are_redone_are_there_once(url: str, train: Train) -> None:
    train(range(20))
    train(range(20, 30))  # written, but the checkpoint behind it was not committed

    train(range(20, 40), attempt=2, world_size=3)

    expected = [(step, rank, 1) for step in range(1, 21) for rank in range(2)]
    expected += [(step, rank, 2) for step in range(21, 41) for rank in range(3)]
    assert places(url) == expected
    assert sorted((row["step"], row["rank"], row["attempt"]) for row in raw_rows(url)) == expected


def test_a_part_that_extends_past_the_checkpoint_is_cut(url: str, train: Train) -> None:
    train(range(30))

    train(range(20, 25), attempt=2)

    assert sorted({(row["step"], row["attempt"]) for row in raw_rows(url)}) == (
        [(step, 1) for step in range(1, 21)] + [(step, 2) for step in range(21, 26)]
    )


def test_what_a_cut_that_was_killed_left_is_read_once(url: str, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train(range(30))
    monkeypatch.setattr(Storage, "delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        begin_trace(STORAGE, url, RUN, 20)
    monkeypatch.undo()
    assert len(raw_rows(url)) > 60

    assert places(url) == [(step, rank, 1) for step in range(1, 31) for rank in range(2)]
    train(range(20, 25), attempt=2)
    assert len(raw_rows(url)) == 50


def test_a_dead_attempts_late_part_does_not_count(url: str, train: Train) -> None:
    train(range(10))
    late = {path.name: path.read_bytes() for path in Path(url).glob("*.jsonl")}
    train(range(5, 10), attempt=2)
    for name, content in late.items():
        (Path(url) / name).write_bytes(content)

    assert places(url) == (
        [(step, rank, 1) for step in range(1, 6) for rank in range(2)]
        + [(step, rank, 2) for step in range(6, 11) for rank in range(2)]
    )


def compared(first: str, second: str) -> list[str]:
    return list(differences(read_trace(STORAGE, first), read_trace(STORAGE, second)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_traces_of_any_world_size_agree(url: str, train: Train, world_size: int) -> None:
    train(range(4), world_size=2)
    train(range(4), world_size=world_size, to=url + "-other")

    assert compared(url, url + "-other") == []


def test_a_difference_is_named_by_step_and_sample(url: str, train: Train) -> None:
    train(range(4))
    train(range(3), to=url + "-other", shift=1)

    lines = compared(url, url + "-other")

    assert len(lines) == 4
    assert lines[1] == f"step 2: crops of sample 100 are {(2, 0, 9, 8)!r} and {(3, 0, 9, 8)!r}"
    assert lines[3] == "steps differ from here: 4 and no step"


def row(step: int, **changes: Any) -> dict[str, Any]:
    same = {"learning_rate": 0.1, "samples": [1, 2], "crops": [[0, 0, 8, 8]] * 2, "flips": [0, 1], "masks": ["a", "b"]}
    return {"step": step, **same, **changes}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"learning_rate": 0.2}, "learning rates 0.1 and 0.2"),
        ({"samples": [1, 3]}, "2 samples are in one trace alone; sample 2 is in the first"),
        ({"samples": [1, 1]}, "the second trace has sample 1 twice"),
        ({"flips": [0, 0]}, "flips of sample 2 are 1 and 0"),
        ({"masks": ["c", "b"]}, "masks of sample 1 are 'a' and 'c'"),
        ({"skipped": "the loss of rank 0"}, "the second trace alone made no update"),
        ({"substitutes": {"2": 7}}, "substitutes of sample 2 are None and 7"),
    ],
)
def test_every_kind_of_difference_is_found(changes: dict[str, Any], text: str) -> None:
    assert list(differences(iter([row(1), row(2)]), iter([row(1), row(2, **changes)]))) == [f"step 2: {text}"]


def test_the_trace_of_another_run_is_not_written_over(url: str, train: Train) -> None:
    check_trace(STORAGE, url, RUN)
    train(range(2))
    check_trace(STORAGE, url, RUN)

    with pytest.raises(TraceError, match="must be empty or this run's"):
        check_trace(STORAGE, url, "s3://bucket/runs/second")


def test_a_missing_trace_or_one_of_another_version_is_refused(
    url: str, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TraceError, match="must exist"):
        list(read_trace(STORAGE, url))
    train(range(2))
    monkeypatch.setattr(trace_module, "TRACE_VERSION", 2)
    with pytest.raises(TraceError, match="must be 2, got 1"):
        list(read_trace(STORAGE, url))


def test_a_part_that_cannot_be_written_is_reported_before_the_commit(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TraceWriter(STORAGE, url, rank=0, world_size=1, attempt=1)
    writer.add(batch(0, 0, 1), learning_rate=0.1)
    monkeypatch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(OSError("the store is gone")))

    with pytest.raises(OSError, match="the store is gone"):
        writer.flush()


def test_it_knows_when_storage_has_what_it_was_given(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TraceWriter(STORAGE, url, rank=0, world_size=1, attempt=1)
    is_open = threading.Event()
    write = Storage.write

    def write_late(*arguments: Any) -> None:
        assert is_open.wait(60)
        write(*arguments)

    monkeypatch.setattr(Storage, "write", write_late)
    writer.add(batch(0, 0, 1), learning_rate=0.1)
    assert not writer.is_writing
    writer.write()
    writer.add(batch(1, 0, 1), learning_rate=0.1)
    assert writer.is_writing
    is_open.set()
    wait_until("the part to be written", lambda: not writer.is_writing, 60)
    assert [row["step"] for row in raw_rows(url)] == [1]

    monkeypatch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(OSError("the store is gone")))
    writer.write()

    def is_written() -> bool:
        return not writer.is_writing

    with pytest.raises(OSError, match="the store is gone"):
        wait_until("the failure", is_written, 60)
