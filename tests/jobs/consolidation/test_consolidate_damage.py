"""Damaged checkpoints in consolidation: whatever is read and was altered is named, and nothing is left behind."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_run import (
    CHUNK_BYTES,
    MATERIAL,
    Damage,
    files_of,
    flip,
    left_behind,
    made,
    make_older_run,
    make_run,
    within,
    within_record,
)
from zero_material import commit_zero_files, write_zero_files

from jobs.checkpoint.deepspeed_files.torch_archive import read_archive
from jobs.consolidation.target import Target
from jobs.errors import DamagedCheckpointError
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path, 2, 2)


@pytest.fixture
def older_run(tmp_path: Path) -> RunDirectory:
    return make_older_run(tmp_path, 2, 2)


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "a weight": ("1.safetensors", flip(within("weight/weight.2", 4242)), "altered at"),
    "the last weight": ("1.safetensors", flip(within("weight/bias.0", -1)), "altered at"),
    "a frozen parameter": ("0.safetensors", flip(within("fixed/frozen.0", 77)), "altered at"),
    "a file cut off": (
        "0.safetensors",
        lambda path: os.truncate(path, path.stat().st_size - 1),
        "bytes, not",
    ),
    "a missing file": ("1.safetensors", Path.unlink, "is missing"),
    "a file of zeros": ("0.safetensors", lambda path: path.write_bytes(bytes(path.stat().st_size)), "altered at"),
}
OLDER_DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "a weight": ("rank_1*_optim_states.pt", flip(within_record("data/6", 4242)), "altered at"),
    "the last weight": ("rank_1*_optim_states.pt", flip(within_record("data/6", -1)), "altered at"),
    "a frozen parameter": ("model_states.pt", flip(within_record("data/5", 77)), "altered at"),
    "the pickle": ("rank_0*_optim_states.pt", flip(within_record("data.pkl", 300)), "altered at"),
    "the directory": ("rank_0*_optim_states.pt", flip(lambda path: path.stat().st_size - 20), "altered at"),
    "a file cut off": (
        "rank_1*_optim_states.pt",
        lambda path: os.truncate(path, path.stat().st_size - 1),
        "bytes, not",
    ),
    "a file that is longer": ("model_states.pt", lambda path: os.truncate(path, path.stat().st_size + 1), "bytes, not"),
    "a missing file": ("rank_1*_optim_states.pt", Path.unlink, "is missing"),
    "a file of zeros": (
        "rank_0*_optim_states.pt",
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "altered at",
    ),
}


TARGETS = pytest.mark.parametrize(
    "target", [Target("bf16"), Target("bf16", shard_bytes=12_000)], ids=["one file", "several"]
)


@pytest.mark.parametrize("name", DAMAGES)
@TARGETS
def test_damaged_files_are_found_and_leave_nothing(run: RunDirectory, target: Target, name: str) -> None:
    assert_found(run, target, *DAMAGES[name])


@pytest.mark.parametrize("name", OLDER_DAMAGES)
@TARGETS
def test_damaged_files_of_deepspeeds_are_found_and_leave_nothing(
    older_run: RunDirectory, target: Target, name: str
) -> None:
    assert_found(older_run, target, *OLDER_DAMAGES[name])


def assert_found(run: RunDirectory, target: Target, suffix: str, damage: Damage, what: str) -> None:
    (path, *_) = files_of(run, suffix)
    damage(path)

    with pytest.raises(DamagedCheckpointError, match=what) as caught:
        made(run, target)

    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert [name for name in left_behind(run) if "." in name] == []


def test_moments_are_not_read(run: RunDirectory, older_run: RunDirectory) -> None:
    for path in files_of(run):
        flip(lambda path: path.stat().st_size // 2)(path)
    for path in files_of(older_run, "_optim_states.pt"):
        flip(within_record("data/1", 9000))(path)  # exp_avg of the first group

    made(run)
    made(older_run)


@pytest.mark.parametrize("suffix", ["_model_states.pt", "_optim_states.pt"])
@pytest.mark.parametrize(
    "contents",
    [None, [], {}, {"optimizer_state_dict": 3}, {"module": 3, "param_shapes": [3]}, {"param_shapes": {"a": "b"}}],
    ids=str,
)
def test_whole_files_that_hold_something_else_are_damage(tmp_path: Path, suffix: str, contents: object) -> None:
    files = tmp_path / "files"
    write_zero_files(files, MATERIAL, 2, 1)
    (path,) = files.glob(f"*{suffix}")
    torch.save(contents, path)
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    commit_zero_files(run, named_recipe("tiny"), files, step=7, stage=2, world_size=1, chunk_bytes=CHUNK_BYTES)

    with pytest.raises(DamagedCheckpointError, match="hold something other than what DeepSpeed writes"):
        made(run)


class Marker:
    """What a pickle may name to run code when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"fine": torch.arange(3.0), "evil": Marker(tmp_path / "executed")}, path)

    contents = read_archive(Storage(), str(path), path.stat().st_size)

    assert contents["fine"].place().elements == 3
    assert not (tmp_path / "executed").exists()


@dataclass(frozen=True)
class NotingStorage(Storage):
    """Notes which bytes were read of each file."""

    read_bytes: dict[str, set[int]] = field(default_factory=dict, compare=False)

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        data = super().read_range(url, offset, length, etag)
        self.read_bytes.setdefault(url, set()).update(range(offset, offset + len(data)))
        return data


@pytest.mark.parametrize(("stage", "world_size"), [(1, 1), (2, 2), (3, 3)])
def test_a_byte_that_was_altered_anywhere_is_found_where_it_is_read(
    tmp_path: Path, stage: int, world_size: int
) -> None:
    storage = NotingStorage(retry_seconds=2)
    run = make_run(tmp_path, stage, world_size)
    whole = made(RunDirectory(storage, run.url), Target(out=f"{tmp_path}/whole.safetensors"))
    draw = random.Random(stage)
    assert len(files_of(run)) == world_size
    found = 0
    for number in range(60):
        path = draw.choice(files_of(run))
        place = draw.randrange(path.stat().st_size)
        flip(lambda _, place=place: place)(path)  # type: ignore[misc]
        target = Target(out=f"{tmp_path}/out-{number}.safetensors")

        if place in storage.read_bytes[str(path)]:
            with pytest.raises(DamagedCheckpointError) as caught:
                made(run, target)
            assert str(path) in str(caught.value)
            assert f"altered at {place // CHUNK_BYTES * CHUNK_BYTES} " in str(caught.value)
            assert not Path(target.out).exists()
            found += 1
        else:
            assert made(run, target).files[0].sha256 == whole.files[0].sha256
        flip(lambda _, place=place: place)(path)  # type: ignore[misc]
    assert 10 < found < 60, "moments are not read, all else is"


def test_an_older_commit_without_checksums_of_chunks_is_read_whole_first(older_run: RunDirectory) -> None:
    run = older_run
    commit = Path(run.path("commits", "step-00000007.json"))
    fields = json.loads(commit.read_text())
    for file in fields["files"]:
        del file["chunk_bytes"], file["chunk_crc32cs"]
    commit.write_text(json.dumps(fields | {"format_version": 1}))
    made(run, Target(out=f"{run.url}/a.safetensors"))
    path = files_of(run, "rank_1*_optim_states.pt")[0]
    flip(within_record("data/6", 4242))(path)

    with pytest.raises(DamagedCheckpointError, match="it was altered") as caught:
        made(run, Target(out=f"{run.url}/b.safetensors"))

    assert str(path) in str(caught.value)
