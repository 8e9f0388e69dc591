"""Consolidation of made-up checkpoints, against DeepSpeed's own tool; of real engines' files in test_zero_state."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_run import MATERIAL, STEP, assert_bit_equal, left_behind, made, make_older_run, make_run, tensors_of
from safetensors import safe_open
from safetensors.torch import load_file
from testbed import is_consolidated
from torch import Tensor
from zero_material import Material

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.consolidation.target import Target, consolidated_url
from jobs.errors import CheckpointError
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path, 2, 2)


def deepspeeds_own(run: RunDirectory, dtype: torch.dtype) -> dict[str, Tensor]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, to_torch_tensor

    folder = run.path("checkpoints")
    state = get_fp32_state_dict_from_zero_checkpoint(folder, tag=checkpoint.folder_name(STEP))
    converted: dict[str, Tensor] = to_torch_tensor(state, dtype=dtype)
    return converted


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 7))])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_type_is_bit_equal_to_deepspeeds_own(tmp_path: Path, stage: int, world_size: int, bf16: bool) -> None:
    module_dtype = torch.bfloat16 if bf16 else torch.float32
    frozen = {name: value.to(module_dtype) for name, value in MATERIAL.frozen.items()}
    buffers = {n: b.to(module_dtype) if b.dtype == torch.float32 else b for n, b in MATERIAL.buffers.items()}
    run = make_run(tmp_path, stage, world_size, Material(MATERIAL.groups, frozen, buffers))
    older_run = make_older_run(tmp_path, stage, world_size, bf16=bf16)

    for name, dtype in DTYPES.items():
        own = deepspeeds_own(older_run, dtype)
        # It forgets the frozen parameters of ZeRO 1.
        expected = {**{name: value.to(dtype) for name, value in frozen.items()}, **own}
        assert_bit_equal(tensors_of(made(run, Target(name))), expected)
        assert_bit_equal(tensors_of(made(older_run, Target(name))), expected)


def test_a_file_has_a_checksum_and_says_what_it_was_made_of(run: RunDirectory) -> None:
    result = made(run)

    (file,) = result.files
    assert result.url == file.url == consolidated_url(run, STEP)
    assert file.sha256 == hashlib.sha256(Path(file.url).read_bytes()).hexdigest()
    check = ["sha256sum", "-c", f"{Path(file.url).name}.sha256"]
    subprocess.run(check, cwd=Path(file.url).parent, check=True, stdout=subprocess.DEVNULL)
    with safe_open(file.url, "pt") as opened:
        metadata = opened.metadata()
    recipe = named_recipe("tiny")
    told = {"format": "pt", "run": run.name, "step": "7", "epoch": "0", "dtype": "fp32", "git_commit": "c0ffee"}
    assert told.items() <= metadata.items()
    assert (metadata["recipe_digest"], metadata["dataset_digest"]) == (recipe.digest(), "d" * 64)
    assert json.loads(metadata["model"]) == recipe.to_json()["model"]
    assert json.loads(metadata["versions"])["torch"] == torch.__version__
    assert_bit_equal(load_file(consolidated_url(run, STEP)), load_file(file.url))
    assert left_behind(run) == ["step-00000007.safetensors", "step-00000007.safetensors.sha256"]


@pytest.mark.parametrize("most_bytes", [13_000, 20_000, 1_000_000])
def test_several_files_are_no_larger_than_asked_for_and_have_an_index(run: RunDirectory, most_bytes: int) -> None:
    whole = tensors_of(made(run))

    result = made(run, Target(shard_bytes=most_bytes))

    assert all(Path(file.url).stat().st_size == file.bytes <= most_bytes for file in result.files)
    assert_bit_equal(tensors_of(result), whole)
    index = Path(result.url, "model.safetensors.index.json")
    if most_bytes == 1_000_000:
        assert [Path(file.url).name for file in result.files] == ["model.safetensors"]
        assert not index.exists()
        return
    names = [Path(file.url).name for file in result.files]
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    told = json.loads(index.read_text())
    places = {name: file for file in names for name in load_file(Path(result.url, file))}
    assert told["weight_map"] == places
    assert told["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())


def test_a_tensor_larger_than_a_file_may_be_is_named(run: RunDirectory) -> None:
    with pytest.raises(CheckpointError, match=r"--shard-bytes: must hold the largest tensor, weight\.0"):
        made(run, Target(shard_bytes=8000))


@pytest.mark.parametrize(("out", "expected"), [("mine.safetensors", "mine.safetensors"), ("x", "x/model.safetensors")])
def test_it_is_written_where_it_is_asked_for(run: RunDirectory, tmp_path: Path, out: str, expected: str) -> None:
    result = made(run, Target(out=f"{tmp_path}/deep/{out}"))

    assert result.url == f"{tmp_path}/deep/{expected}"
    assert_bit_equal(load_file(result.url), tensors_of(made(run)))


@pytest.mark.parametrize("target", [Target(), Target(shard_bytes=20_000)], ids=["one file", "several"])
def test_what_is_there_is_refused_kept_or_replaced(run: RunDirectory, target: Target) -> None:
    first = made(run, target, if_exists="refuse")
    times = [Path(file.url).stat().st_mtime_ns for file in first.files]

    with pytest.raises(CheckpointError, match=r"target: must not exist, got .*--force"):
        made(run, target, if_exists="refuse")
    kept = made(run, target, if_exists="keep")
    assert (kept.files, kept.kept) == (first.files, len(first.files))
    assert [Path(file.url).stat().st_mtime_ns for file in first.files] == times

    assert made(run, target, if_exists="replace").files == first.files
    assert all(Path(file.url).stat().st_mtime_ns > before for file, before in zip(first.files, times, strict=True))


def test_files_of_another_size_are_replaced_whole(run: RunDirectory) -> None:
    made(run, Target(shard_bytes=12_000))

    result = made(run, Target(shard_bytes=20_000), if_exists="replace")

    names = {Path(file.url).name for file in result.files}
    there = {path.name.removesuffix(".sha256") for path in Path(result.url).iterdir()}
    assert there == {*names, "model.safetensors.index.json"}


def test_a_foreign_file_is_not_replaced_unless_forced(run: RunDirectory, tmp_path: Path) -> None:
    target = Target(out=f"{tmp_path}/mine.safetensors")
    Path(target.out).write_bytes(b"my own")

    for how in ("refuse", "keep"):
        with pytest.raises(CheckpointError, match="target: must not exist"):
            made(run, target, if_exists=how)
        assert Path(target.out).read_bytes() == b"my own"
    made(run, target, if_exists="replace")
    assert_bit_equal(load_file(target.out), tensors_of(made(run)))


def test_unknown_steps_and_files_without_a_commit_are_refused(run: RunDirectory) -> None:
    with pytest.raises(CheckpointError, match=r"step: must be a committed checkpoint, got 8; committed: 7"):
        made(run, step=8)
    Path(run.path("commits", "step-00000007.json")).unlink()
    with pytest.raises(CheckpointError, match="run: must have a committed checkpoint"):
        made(run)
    assert left_behind(run) == []


def with_value(value: float) -> Material:
    groups = [dict(group) for group in MATERIAL.groups]
    groups[0]["weight.2"] = groups[0]["weight.2"].clone()
    groups[0]["weight.2"][1234] = value
    return Material(groups, MATERIAL.frozen, MATERIAL.buffers)


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 70000.0), ("fp16", -65520.0), ("bf16", 3.4e38)])
def test_a_value_that_overflows_is_refused_and_its_tensor_named(tmp_path: Path, dtype: str, value: float) -> None:
    run = make_run(tmp_path, 1, 2, with_value(value))

    with pytest.raises(CheckpointError, match=rf"--dtype: must hold every value of weight\.2, got '{dtype}, and one"):
        made(run, Target(dtype, shard_bytes=12_000))
    assert left_behind(run) == [f"step-00000007-{dtype}"]
    made(run)


@pytest.mark.parametrize("value", [65519.0, float("inf"), float("nan")])
def test_what_fits_or_was_never_finite_is_converted(tmp_path: Path, value: float) -> None:
    run = make_run(tmp_path, 1, 2, with_value(value))

    found = tensors_of(made(run, Target("fp16")))["weight.2"][1234].float()

    expected = torch.tensor(value).half().float()
    assert torch.equal(found.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))


def test_a_consolidated_step_is_known(run: RunDirectory) -> None:
    assert not is_consolidated(run, STEP)
    result = made(run)
    assert is_consolidated(run, STEP)
    Path(result.url).unlink()
    assert not is_consolidated(run, STEP)


@pytest.mark.parametrize(
    ("options", "field"), [({"dtype": "fp8"}, "--dtype"), ({"out": "a.safetensors", "shard_bytes": 9}, "--out")]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        Target(**options)


@pytest.mark.parametrize(
    ("make", "rule"),
    [(make_run, r"commit: must list each value of weight\.1 once"), (make_older_run, "states of all its 2 ranks")],
    ids=["ours", "DeepSpeed's"],
)
def test_a_missing_rank_is_refused(tmp_path: Path, make: Callable[..., RunDirectory], rule: str) -> None:
    run = make(tmp_path, 2, 2)
    path = Path(run.path("commits", "step-00000007.json"))
    fields = json.loads(path.read_text())
    fields["files"] = [file for file in fields["files"] if not re.search("rank_1|rank-00001", file["name"])]
    path.write_text(json.dumps(fields))
    assert isinstance(checkpoint.read_commit(run, STEP), Commit)

    with pytest.raises(CheckpointError, match=rule):
        made(run)


def test_neither_torch_nor_deepspeed_is_imported(run: RunDirectory, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from jobs.consolidation import consolidate, consolidate_command\n"
        "from jobs.run.directory import RunDirectory\n"
        "from pipeline.store.storage import Storage\n"
        f"consolidate.consolidate(RunDirectory(Storage(), {run.url!r}))\n"
        "assert not {'torch', 'deepspeed', 'ray'} & sys.modules.keys()\n"
    )

    subprocess.run([sys.executable, "-c", program], check=True)
    shutil.rmtree(run.url)
