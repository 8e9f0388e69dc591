from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from zero_material import upload_files

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.retention import carry_out, delete_leftovers_before, leftovers, plan_pruning, pruning_lines
from jobs.errors import CheckpointError
from jobs.run.directory import RunDirectory
from pipeline.store.lease import Holder
from pipeline.store.storage import Storage


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Six checkpoints, the second of them a milestone."""
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    for step in (10, 20, 30, 40, 50, 60):
        save(run, step, milestone=step == 20)
    return run


def save(run: RunDirectory, step: int, *, claim: int = 1, attempt: int = 1, milestone: bool = False) -> None:
    upload(run, step, claim, attempt)
    local = Path(run.path("local"))
    files = upload_files(run, step, local, checkpoint.owner_name(claim, attempt))
    commit = Commit(
        step=step, epoch=0, world_size=1, zero_stage=1, precision="fp32", recipe_digest="a", dataset_digest="b",
        order_version=1, seed=0, attempt=attempt, created_at_seconds=1.0, milestone=milestone, counters={},
        versions={}, files=tuple(files), claim=claim,
    )  # fmt: skip
    checkpoint.write_commit(run, commit)


def upload(run: RunDirectory, step: int, claim: int, attempt: int) -> None:
    local = Path(run.path("local"))
    local.mkdir(parents=True, exist_ok=True)
    (local / "weights.pt").write_bytes(b"weights of %d" % step)
    upload_files(run, step, local, checkpoint.owner_name(claim, attempt))


def weights(run: RunDirectory, step: int, owner: str = "000001-0001") -> Path:
    return Path(run.path("checkpoints", checkpoint.folder_name(step), owner, "weights.pt"))


def holder(run: RunDirectory, number: int, pid: int | None = None, **changes: object) -> None:
    """A driver of the run under claim `number`."""
    content = {**dataclasses.asdict(Holder.here("drives the run")), "beat": 1, **changes}
    if pid is not None:
        content["process"] |= {"pid": pid}
    run.storage.write(run.path("claims", f"claim-{number:06d}.json"), json.dumps(content).encode())


def test_the_newest_and_the_milestones_are_kept(run: RunDirectory) -> None:
    plan = plan_pruning(run, keep=2)

    assert [commit.step for commit in plan.old] == [10, 30, 40]
    assert plan.kept == (20, 50, 60)
    assert checkpoint.committed_steps(run) == [10, 20, 30, 40, 50, 60], "nothing is deleted by looking"
    carry_out(run, plan)
    assert checkpoint.committed_steps(run) == [20, 50, 60]
    assert [weights(run, step).exists() for step in (10, 20, 50)] == [False, True, True]
    assert list(pruning_lines(plan_pruning(run, keep=2))) == ["nothing to delete", "stays: 20, 50, 60"]


def test_the_newest_whole_one_is_kept_and_damaged_ones_do_not_count(run: RunDirectory) -> None:
    weights(run, 60).write_bytes(b"weights of 61")
    weights(run, 50).unlink()

    plan = plan_pruning(run, keep=1)

    assert [commit.step for commit in plan.old] == [10, 30]
    assert [(commit.step, "missing" in fault) for commit, fault in plan.damaged] == [(60, False), (50, True)]
    assert plan.kept == (20, 40)


def test_if_none_is_whole_none_is_deleted(run: RunDirectory) -> None:
    for step in checkpoint.committed_steps(run):
        weights(run, step).unlink()

    with pytest.raises(CheckpointError, match="must be whole, and none is"):
        plan_pruning(run, keep=1)


def test_a_commit_of_another_format_stays_with_its_files(run: RunDirectory) -> None:
    path = Path(checkpoint.commit_url(run, 30))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))

    plan = plan_pruning(run, keep=1)

    assert [commit.step for commit in plan.old] == [10, 40, 50]
    assert plan.leftovers == {}


def test_files_that_were_never_committed_are_leftovers_except_those_of_a_live_driver(run: RunDirectory) -> None:
    upload(run, 45, claim=1, attempt=2)
    upload(run, 55, claim=2, attempt=3)
    everything = {"step-00000045/000001-0002/weights.pt": 13, "step-00000055/000002-0003/weights.pt": 13}

    assert leftovers(run) == everything
    holder(run, 2)
    assert list(leftovers(run)) == ["step-00000045/000001-0002/weights.pt"]
    holder(run, 2, over=True)
    assert leftovers(run) == everything
    holder(run, 2, pid=4194399)  # above the largest pid of Linux: it died on this machine
    assert leftovers(run) == everything
    lines = "\n".join(pruning_lines(plan := plan_pruning(run, keep=6)))
    assert "checkpoints/step-00000055/000002-0003: 1 files, 13 B, never committed" in lines
    carry_out(run, plan)
    assert leftovers(run) == {}
    assert len(checkpoint.committed_steps(run)) == 6


def test_a_commit_clears_what_earlier_attempts_and_drivers_left(run: RunDirectory) -> None:
    for claim, attempt in ((0, 9), (2, 2), (2, 3), (3, 1)):
        upload(run, 70, claim, attempt)

    delete_leftovers_before(run, claim=2, attempt=3)

    assert [path.split("/")[1] for path in leftovers(run)] == ["000002-0003", "000003-0001"]
    assert len(checkpoint.committed_steps(run)) == 6
