"""Checkpoints on paper against those that are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from restore_group import shapes_of
from scale_layout import made_up, restoring
from zero_material import commit_state, random_material

from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

MATERIAL = replace(random_material(50_000, tensor_elements=7_001), frozen={}, buffers={})


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("stage", [1, 3])
def test_files_on_paper_are_as_those_that_are_written(tmp_path: Path, stage: int, world_size: int) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    written = commit_state(run, named_recipe("tiny"), MATERIAL, step=10, stage=stage, world_size=world_size)

    commit = made_up(shapes_of(MATERIAL), stage, world_size).commit

    assert commit.tensors == written.tensors
    for paper, real in zip(commit.files, written.files, strict=True):
        assert (paper.trained, paper.data_offset, paper.bytes) == (real.trained, real.data_offset, real.bytes)


@pytest.mark.parametrize("stage", [1, 3])
def test_requests_on_paper_grow_with_the_ranks(stage: int) -> None:
    groups = shapes_of(random_material(2_000_000, tensor_elements=100_000))

    few, many = restoring(groups, stage, 8, 8), restoring(groups, stage, 64, 64)

    assert 0 < many.requests < 9 * few.requests
    assert many.read_bytes >= many.checkpoint_bytes
