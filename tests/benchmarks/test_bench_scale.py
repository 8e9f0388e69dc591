"""Checkpoints on paper against those that DeepSpeed writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from restore_group import shapes_of
from scale_layout import made_up, restoring
from zero_material import commit_zero_files, random_material, write_zero_files

from jobs.checkpoint.checked_files import CheckedFiles
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.zero_files import OptimizerFile, look_into
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

MATERIAL = replace(random_material(50_000, tensor_elements=7_001), frozen={}, buffers={})


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("stage", [1, 3])
def test_vectors_on_paper_are_as_long_as_those_in_files(tmp_path: Path, stage: int, world_size: int) -> None:
    write_zero_files(tmp_path / "local", MATERIAL, stage, world_size)
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    commit = commit_zero_files(
        run, named_recipe("tiny"), tmp_path / "local", step=10, stage=stage, world_size=world_size
    )
    written = look_into(run, commit, CheckedFiles(run, commit), moments=True)

    files, found = made_up(shapes_of(MATERIAL), stage, world_size)

    def lengths(name: str, file: OptimizerFile) -> tuple[str, list[int]]:
        vectors = [file.masters, *(file.moments[moment] for moment in MOMENTS)]
        return name.rpartition("/")[2], [place.elements for group in vectors for place in group]

    on_paper = [lengths(name, file) for name, file in found.items() if isinstance(file, OptimizerFile)]
    in_files = [lengths(name, file) for name, file in written.items() if isinstance(file, OptimizerFile)]
    # What pads a group behind its last value is omitted on paper: DeepSpeed writes it in ZeRO 3 alone.
    assert [name for name, _ in on_paper] == [name for name, _ in in_files]
    for (_, paper), (_, real) in zip(on_paper[:-1], in_files[:-1], strict=True):
        assert paper[:: len(MATERIAL.groups)] == real[:: len(MATERIAL.groups)]
    assert sum(file.bytes for file in files.commit.files) == pytest.approx(commit.bytes, abs=30_000 * len(commit.files))


@pytest.mark.parametrize("stage", [1, 3])
def test_requests_on_paper_grow_with_the_ranks(stage: int) -> None:
    groups = shapes_of(random_material(2_000_000, tensor_elements=100_000))

    few, many = restoring(groups, stage, 8, 8), restoring(groups, stage, 64, 64)

    assert 0 < many.requests < 9 * few.requests
    assert many.read_bytes >= many.checkpoint_bytes
