from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from committed import save
from zero_material import upload_files

from jobs.checkpoint import checkpoint
from jobs.checkpoint.check import faults_of
from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.errors import CheckpointError, DamagedCheckpointError, OvertakenError
from jobs.run.directory import RunDirectory
from pipeline.store.lease import Holder
from pipeline.store.storage import Storage

FILES = {"model_states.pt": os.urandom(5000), "rank-0.pt": os.urandom(300), "rank-1.pt": b""}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """What the ranks wrote to local disk; DeepSpeed leaves a folder beside its files."""
    folder = tmp_path / "local"
    (folder / "nested").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def stored(run: RunDirectory, commit: Commit, name: str) -> Path:
    return Path(run.path("checkpoints", checkpoint.folder_name(commit.step), name))


def test_files_without_a_commit_are_invisible(run: RunDirectory, local: Path) -> None:
    upload_files(run, 5, local)

    assert checkpoint.committed_steps(run) == []
    assert checkpoint.latest_commit(run) is None
    with pytest.raises(CheckpointError, match="none yet"):
        checkpoint.read_commit(run, 5)


def test_a_committed_checkpoint_comes_back_whole(run: RunDirectory, local: Path) -> None:
    commit = save(run, local, 5)

    found = checkpoint.latest_commit(run)
    assert found == commit
    assert faults_of(run, found) == []
    assert {file.name: stored(run, found, file.name).read_bytes() for file in found.files} == FILES
    assert found.bytes == sum(len(data) for data in FILES.values())


def test_the_newest_commit_is_that_of_the_highest_step(run: RunDirectory, local: Path) -> None:
    for step in (20, 100_000_000, 3):
        save(run, local, step)

    assert checkpoint.committed_steps(run) == [3, 20, 100_000_000]
    assert (latest := checkpoint.latest_commit(run)) and latest.step == 100_000_000
    with pytest.raises(CheckpointError, match=r"got 4; committed: 3, 20, 100000000"):
        checkpoint.read_commit(run, 4)


def test_a_saved_step_can_be_saved_again(run: RunDirectory, local: Path) -> None:
    save(run, local, 5)
    (local / "rank-0.pt").write_bytes(b"other")

    commit = save(run, local, 5)

    assert faults_of(run, commit) == []
    assert stored(run, commit, "rank-0.pt").read_bytes() == b"other"


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda data: None, "is missing"),
        (lambda data: data[:-1], "has 299 bytes where 300 were written"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "was altered"),
        (lambda data: data + b"\0", "has 301 bytes"),
        (lambda data: b"", "has 0 bytes"),
    ],
    ids=["missing", "truncated", "bit flipped", "longer", "emptied"],
)
def test_a_damaged_file_is_found_and_named(run: RunDirectory, local: Path, damaged: Any, message: str) -> None:
    commit = save(run, local, 5)
    path = stored(run, commit, "rank-0.pt")
    data = damaged(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)

    (fault,) = faults_of(run, commit)

    assert fault.startswith(f"{path} {message}")
    assert len(fault.splitlines()) == 1


@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 300, 4096])
def test_every_chunk_has_its_checksum(run: RunDirectory, local: Path, chunk_bytes: int) -> None:
    for file in upload_files(run, 5, local, chunk_bytes=chunk_bytes):
        data = FILES[file.name]

        assert (file.bytes, file.crc32c) == (len(data), google_crc32c.value(data))
        chunks = [data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes)]
        assert file.chunk_checksums() == [google_crc32c.value(chunk) for chunk in chunks]


def test_another_format_is_refused(run: RunDirectory, local: Path) -> None:
    commit = save(run, local, 5)
    fields = dataclasses.asdict(commit)
    path = Path(run.path("commits", "step-00000005.json"))

    for version in (9, None):
        path.write_text(json.dumps(fields | {"format_version": version}))
        with pytest.raises(CheckpointError, match=f"format_version: must be 1, 2, 3 or 4, got {version}"):
            checkpoint.latest_commit(run)


def as_in_format_3(commit: Commit) -> dict[str, Any]:
    fields = dataclasses.asdict(commit) | {"format_version": 3}
    del fields["tensors"], fields["optimizer_step"]
    for file in fields["files"]:
        del file["data_offset"], file["trained"], file["fixed"]
    return fields


@pytest.mark.parametrize(("version", "without"), [(3, ()), (2, ("digest",))])
def test_a_commit_of_an_older_format_is_read(
    run: RunDirectory, local: Path, version: int, without: tuple[str, ...]
) -> None:
    """As earlier releases wrote them: DeepSpeed's own files; before format 3, no digest."""
    commit = save(run, local, 5)
    fields = as_in_format_3(commit) | {"format_version": version}
    for name in without:
        del fields[name]
    Path(run.path("commits", "step-00000005.json")).write_text(json.dumps(fields))

    found = checkpoint.read_commit(run, 5)

    assert found == dataclasses.replace(commit, format_version=version)
    assert found.is_of_deepspeed
    assert not commit.is_of_deepspeed


def test_a_commit_of_format_1_is_read(run: RunDirectory, local: Path) -> None:
    """As earlier releases wrote them: no claim, no driver, no chunks, files directly in the folder of their step."""
    commit = save(run, local, 5)
    fields = as_in_format_3(commit) | {"format_version": 1}
    del fields["claim"], fields["driver"], fields["digest"]
    for file in fields["files"]:
        del file["chunk_bytes"], file["chunk_crc32cs"]
    Path(run.path("commits", "step-00000005.json")).write_text(json.dumps(fields))

    found = checkpoint.read_commit(run, 5)

    plain = tuple(CheckpointFile(file.name, file.bytes, file.crc32c) for file in commit.files)
    assert found == dataclasses.replace(commit, files=plain, format_version=1)
    assert faults_of(run, found) == []


@pytest.mark.parametrize(
    "changed",
    [
        lambda fields: {name: value for name, value in fields.items() if name != "step"},
        lambda fields: {name: value for name, value in fields.items() if name != "files"},
        lambda fields: fields | {"files": [{"name": "a"}]},
        lambda fields: fields | {"files": [fields["files"][0] | {"chunk_crc32cs": ""}]},
        lambda fields: fields | {"files": [fields["files"][0] | {"chunk_crc32cs": "no digits" * 100}]},
        lambda fields: fields | {"surplus": 1},
        lambda fields: [fields],
    ],
    ids=["no step", "no files", "a file without size", "checksums missing", "no checksums", "a field more", "a list"],
)
def test_a_commit_without_its_fields_is_damaged(run: RunDirectory, local: Path, changed: Any) -> None:
    fields = dataclasses.asdict(save(run, local, 5))
    Path(run.path("commits", "step-00000005.json")).write_text(json.dumps(changed(fields)))

    with pytest.raises(DamagedCheckpointError, match="commit: must"):
        checkpoint.read_commit(run, 5)


def test_prune_keeps_the_newest_and_the_milestones(run: RunDirectory, local: Path) -> None:
    commits = {step: save(run, local, step, milestone=step == 20) for step in (10, 20, 30, 40, 50)}

    assert checkpoint.prune(run, keep=2) == [10, 30]

    assert checkpoint.committed_steps(run) == [20, 40, 50]
    for step, commit in commits.items():
        assert all(stored(run, commit, name).exists() == (step in (20, 40, 50)) for name in FILES)
    assert checkpoint.prune(run, keep=2) == []


def test_skipped_ones_do_not_displace_the_newest_good_one(run: RunDirectory, local: Path) -> None:
    """30 was damaged, so the run resumed from 20 and has just committed 25."""
    for step in (10, 20, 30, 25):
        save(run, local, step)

    assert checkpoint.prune(run, keep=1, newest=25) == [10, 20]

    assert checkpoint.committed_steps(run) == [25, 30]


def by(commit: Commit, claim: int) -> Commit:
    return dataclasses.replace(commit, claim=claim, driver=f"driver-{claim}")


def test_a_commit_of_a_driver_that_was_taken_over_from_is_refused_by_name(run: RunDirectory, local: Path) -> None:
    mine = by(save(run, local, 5), 2)
    checkpoint.write_commit(run, mine)

    with pytest.raises(OvertakenError, match="committed at this step by driver-2"):
        checkpoint.write_commit(run, by(mine, 1))
    assert checkpoint.read_commit(run, 5) == mine

    Path(run.path("claims")).mkdir()
    Path(run.path("claims", "claim-000003.json")).write_text(
        json.dumps(dataclasses.asdict(Holder.here("drives the run")) | {"beat": 1, "age_seconds": 75.5})
    )
    with pytest.raises(OvertakenError, match=r"is driven by .*@.*\(process \d+, drives the run.*lease is 76 s old"):
        checkpoint.write_commit(run, dataclasses.replace(mine, step=6))
    assert checkpoint.committed_steps(run) == [5]


def test_a_commit_of_an_attempt_that_others_continued_without_is_refused(run: RunDirectory, local: Path) -> None:
    """As from a rank whose node was cut off while it committed."""
    first = by(save(run, local, 5), 1)
    later = dataclasses.replace(first, attempt=first.attempt + 1)
    checkpoint.write_commit(run, later)

    with pytest.raises(OvertakenError, match="committed at this step by driver-1"):
        checkpoint.write_commit(run, first)
    assert checkpoint.read_commit(run, 5) == later

    run.write_heartbeat(
        {"state": "running", "step": 5, "total_steps": 20, "updated_at_seconds": 0.0, "attempt": later.attempt}
    )
    with pytest.raises(OvertakenError, match=f"is at attempt {later.attempt}"):
        checkpoint.write_commit(run, dataclasses.replace(first, step=6))
    checkpoint.write_commit(run, dataclasses.replace(later, step=7))
    assert checkpoint.committed_steps(run) == [5, 7]


def test_a_commit_that_was_skipped_is_replaced(run: RunDirectory, local: Path) -> None:
    commit = save(run, local, 5)
    Path(run.path("commits", "step-00000005.json")).write_text('{"step": 5')

    checkpoint.write_commit(run, by(commit, 1))
    checkpoint.write_commit(run, by(commit, 3))

    assert checkpoint.read_commit(run, 5) == by(commit, 3)


class DeadStorage(Storage):
    """Dies permanently after a number of deletions."""

    deletions_left: int

    def delete(self, url: str) -> None:
        if type(self).deletions_left == 0:
            raise OSError(url)
        type(self).deletions_left -= 1
        super().delete(url)


@pytest.mark.parametrize("deletions", range(len(FILES) + 1))
def test_a_kill_while_pruning_leaves_nothing_that_looks_complete(
    run: RunDirectory, local: Path, deletions: int
) -> None:
    for step in (10, 20):
        save(run, local, step)
    DeadStorage.deletions_left = deletions

    with pytest.raises(OSError, match="first"):
        checkpoint.prune(RunDirectory(DeadStorage(), run.url), keep=1)

    for step in checkpoint.committed_steps(run):  # each one that can be seen is whole
        assert faults_of(run, checkpoint.read_commit(run, step)) == []
    assert checkpoint.committed_steps(run) == ([10, 20] if deletions == 0 else [20])
