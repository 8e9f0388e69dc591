"""Saving during training, in a process group of one; whole runs save with two and more in other files."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from patience import wait_until

from jobs.checkpoint import checkpoint
from jobs.checkpoint.check import faults_of
from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.checkpoint.rank_file import CopyRoom, RankPart
from jobs.checkpoint.saver import CheckpointSaver
from jobs.errors import CheckpointError
from jobs.run.directory import RunDirectory
from pipeline.host.memory_file import MemoryFile
from pipeline.store.storage import Storage


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("ray.get", lambda reply: reply)
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting-point").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Gate(Storage):
    """Local files; uploads wait until they are released, and fail on request."""

    open = threading.Event()
    broken = ""

    def upload(self, path: Path, url: str) -> None:
        assert type(self).open.wait(30)
        if type(self).broken and type(self).broken in url:
            raise OSError("the store is gone")
        super().upload(path, url)


class Monitor:
    """Stands for the actor: notes what is reported to it, in order."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.reported: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(**fields: Any) -> None:
                self.reported.append((name, fields.get("step", checkpoint.committed_steps(self.run))))

        return Method


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(Gate, "open", threading.Event())
    monkeypatch.setattr(Gate, "broken", "")
    return RunDirectory.of(Gate(), str(tmp_path / "runs"), "first")


@pytest.fixture
def monitor(run: RunDirectory) -> Monitor:
    return Monitor(run)


@pytest.fixture
def saver(run: RunDirectory, monitor: Monitor) -> CheckpointSaver:
    return CheckpointSaver(run, monitor, rank=0, world_size=1, keep=2)  # type: ignore[arg-type]


def commit(step: int) -> Commit:
    return Commit(
        step=step, epoch=0, world_size=1, zero_stage=1, precision="fp32", recipe_digest="a", dataset_digest="b",
        order_version=1, seed=0, attempt=1, created_at_seconds=1.0, milestone=False, counters={}, versions={}, files=(),
    )  # fmt: skip


FILE = MemoryFile("part", 7)
FILE.memory[:] = b"weights"


def copied() -> RankPart:
    return RankPart(CopyRoom(FILE.path, memoryview(FILE.memory)), CheckpointFile("weights", 0, 0, data_offset=7))


def test_training_continues_during_the_upload(saver: CheckpointSaver, run: RunDirectory, monitor: Monitor) -> None:
    saver.begin(commit(5), copied)

    assert saver.is_under_way
    assert saver.is_uploading
    assert checkpoint.committed_steps(run) == []
    Gate.open.set()
    wait_until("the upload", lambda: not saver.is_uploading, 10)
    assert checkpoint.committed_steps(run) == []
    saver.finish()
    assert not saver.is_under_way
    saver.close()

    found = checkpoint.latest_commit(run)
    assert found is not None
    assert [(file.name, file.bytes) for file in found.files] == [("000000-0001/weights", 7)]
    assert faults_of(run, found) == []
    assert monitor.reported == [("flush", []), ("checkpoint_committed", 5)]  # history first


def test_the_next_checkpoint_waits_for_the_one_before(
    saver: CheckpointSaver, run: RunDirectory, monitor: Monitor
) -> None:
    threading.Timer(0.3, Gate.open.set).start()
    saver.begin(commit(5), copied)
    seen = []

    saver.begin(commit(6), lambda: (seen.append(saver.is_uploading), copied())[1])
    saver.close()

    assert seen == [False]
    assert checkpoint.committed_steps(run) == [5, 6]
    assert [step for kind, step in monitor.reported if kind == "checkpoint_committed"] == [5, 6]


@pytest.mark.parametrize("broken", ["000000-0001/weights", "commits"])
def test_one_that_fails_is_reported_and_stays_invisible_and_the_next_is_saved(
    saver: CheckpointSaver, run: RunDirectory, monitor: Monitor, broken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Gate.open.set()
    Gate.broken = broken
    if broken == "commits":
        monkeypatch.setattr(Gate, "create", lambda self, url, data: (_ for _ in ()).throw(OSError("the store is gone")))
    saver.begin(commit(5), copied)
    saver.finish()
    wait_until("the failure", lambda: ("checkpoint_failed", 5) in monitor.reported, 10)
    assert checkpoint.committed_steps(run) == []
    monkeypatch.undo()
    monkeypatch.setattr("ray.get", lambda reply: reply)
    Gate.broken = ""
    Gate.open.set()

    saver.begin(commit(6), copied)
    saver.close()

    assert checkpoint.committed_steps(run) == [6]


def test_a_run_does_not_end_as_if_its_last_checkpoint_were_there(saver: CheckpointSaver, run: RunDirectory) -> None:
    Gate.open.set()
    Gate.broken = "step-00000005"
    saver.begin(commit(5), copied)

    with pytest.raises(CheckpointError, match=r"before the run ends, got 'step 5: rank 0: OSError: the store is gone'"):
        saver.close()

    assert checkpoint.committed_steps(run) == []


def test_what_cannot_be_copied_leaves_nothing_under_way(saver: CheckpointSaver) -> None:
    def full() -> RankPart:
        raise OSError(12, "Cannot allocate memory")

    with pytest.raises(OSError, match="Cannot allocate"):
        saver.begin(commit(5), full)

    assert not saver.is_under_way


def test_what_the_store_holds_other_than_was_copied_is_found(saver: CheckpointSaver, run: RunDirectory) -> None:
    """Checksums are of the copy, not of what was read again to be sent."""
    Gate.open.set()
    other = MemoryFile("other", 7)
    other.memory[:] = b"weighty"
    differs = CopyRoom(other.path, memoryview(FILE.memory))
    saver.begin(commit(5), lambda: dataclasses.replace(copied(), room=differs))
    saver.close()

    (fault,) = faults_of(run, checkpoint.read_commit(run, 5))
    assert "000000-0001/weights was altered" in fault
