"""Which checkpoint is gone on from, in a process group of one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from jobs import checkpoint
from jobs.checkpoint import Commit
from jobs.errors import CheckpointError
from jobs.restore import Fetched, fetch_newest
from jobs.run_directory import RunDirectory
from pipeline.storage import Storage

STEPS = (10, 20, 30)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting-point").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    local = tmp_path / "local"
    local.mkdir()
    for step in STEPS:
        (local / "weights.pt").write_bytes(b"weights of %d" % step)
        files = tuple(checkpoint.upload_files(run, step, local))
        checkpoint.write_commit(run, Commit(
            step=step, epoch=0, world_size=1, zero_stage=1, precision="fp32", recipe_digest="a", dataset_digest="b",
            order_version=1, seed=0, attempt=1, created_at_seconds=1.0, milestone=False, counters={}, versions={},
            files=files,
        ))  # fmt: skip
    return run


def newest(run: RunDirectory, tmp_path: Path) -> tuple[Fetched | None, list[tuple[int, str]]]:
    scratch, passed_over = tmp_path / "scratch", []
    scratch.mkdir()
    found = fetch_newest(
        run, scratch, rank=0, world_size=1,
        check=lambda commit: None, on_damage=lambda step, why: passed_over.append((step, why)),
    )  # fmt: skip
    return found, passed_over


def weights_of(run: RunDirectory, step: int) -> Path:
    return Path(run.path("checkpoints", checkpoint.folder_name(step), "weights.pt"))


def commit_of(run: RunDirectory, step: int) -> Path:
    return Path(run.path("commits", f"{checkpoint.folder_name(step)}.json"))


def test_it_is_the_newest_where_all_are_whole(run: RunDirectory, tmp_path: Path) -> None:
    found, passed_over = newest(run, tmp_path)

    assert found is not None
    assert found.commit.step == 30
    assert (found.folder / "weights.pt").read_bytes() == b"weights of 30"
    assert passed_over == []


def test_damaged_ones_are_passed_over_and_told(run: RunDirectory, tmp_path: Path) -> None:
    weights_of(run, 30).write_bytes(b"weights of 31")
    commit_of(run, 20).write_text(commit_of(run, 20).read_text()[:-9])

    found, passed_over = newest(run, tmp_path)

    assert found is not None
    assert found.commit.step == 10
    assert [step for step, _ in passed_over] == [30, 20]
    assert "weights.pt was altered" in passed_over[0][1]
    assert "must be a JSON object" in passed_over[1][1]


def test_where_none_is_whole_nothing_is_started_from_zero(run: RunDirectory, tmp_path: Path) -> None:
    for step in STEPS:
        weights_of(run, step).unlink()

    with pytest.raises(CheckpointError, match="must be whole, and none is, got '10, 20, 30'"):
        newest(run, tmp_path)


def test_another_format_is_refused_not_passed_over(run: RunDirectory, tmp_path: Path) -> None:
    fields = dataclasses.asdict(checkpoint.read_commit(run, 30)) | {"format_version": 9}
    commit_of(run, 30).write_text(json.dumps(fields))

    with pytest.raises(CheckpointError, match="format_version: must be 1 or 2, got 9"):
        newest(run, tmp_path)


def test_before_the_first_commit_there_is_none(tmp_path: Path) -> None:
    found, passed_over = newest(RunDirectory.of(Storage(), str(tmp_path / "empty"), "new"), tmp_path)

    assert found is None
    assert passed_over == []
