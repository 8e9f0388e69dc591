"""Requests of a restore as ranks and files grow, with real process groups on gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from restore_group import RestoreGroup, restore_group, shapes_of
from restore_rank import crc_of, owned_of
from zero_material import commit_state, random_material

from jobs.checkpoint import checkpoint
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

WORLD_SIZES = (2, 4, 8)
CHUNK_BYTES = 1 << 12
"""So small that a file of this material has as many as one of a real model."""
MATERIAL = random_material(400_000, tensor_elements=10_000)
TRAINED = {name: value for group in MATERIAL.groups for name, value in group.items()}
BUFFERS = {name: value.float() if value.is_floating_point() else value for name, value in MATERIAL.buffers.items()}
WEIGHTS = crc_of({**TRAINED, **MATERIAL.frozen, **BUFFERS}.items())
REQUESTS_OF_ANY, REQUESTS_A_RANK, REQUESTS_A_FILE = 4, 5, 2


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RestoreGroup]]:
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.ExitStack() as stack:
        yield {size: stack.enter_context(restore_group(size, folder)) for size in WORLD_SIZES}


def run_of(folder: Path, stage: int, world_size: int) -> RunDirectory:
    run = RunDirectory.of(Storage(), str(folder / "runs"), f"zero-{stage}-of-{world_size}")
    commit_state(
        run, named_recipe("tiny"), MATERIAL, step=30, stage=stage, world_size=world_size, chunk_bytes=CHUNK_BYTES
    )
    return run


def moments_of(stage: int, rank: int, world_size: int) -> int:
    found = []
    for name, values in owned_of(shapes_of(MATERIAL), stage, rank, world_size).items():
        flat = TRAINED[name].reshape(-1)[values.start : values.stop]
        found += [(f"exp_avg {name}", flat * 0.5), (f"exp_avg_sq {name}", flat.square())]
    return crc_of(found)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("before", [1, 4, 16])
def test_requests_grow_with_ranks_and_files_and_never_with_their_product(
    tmp_path: Path, groups: dict[int, RestoreGroup], stage: int, before: int
) -> None:
    run = run_of(tmp_path, stage, before)
    commit = checkpoint.read_commit(run, 30)

    for now, group in groups.items():
        found = group.restore(run, shapes_of(MATERIAL), stage)

        ranks_and_files = REQUESTS_A_RANK * now + REQUESTS_A_FILE * len(commit.files)
        assert sum(answer["requests"] for answer in found) <= REQUESTS_OF_ANY + ranks_and_files
        assert commit.bytes <= sum(answer["read_bytes"] for answer in found) < 1.05 * commit.bytes
        assert {answer["weights"] for answer in found} == {WEIGHTS}
        assert [answer["moments"] for answer in found] == [moments_of(stage, rank, now) for rank in range(now)]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_group_restores_its_own_checkpoint_in_requests_that_grow_with_it(
    tmp_path: Path, groups: dict[int, RestoreGroup], stage: int
) -> None:
    for size, group in groups.items():
        run = run_of(tmp_path, stage, size)

        found = group.restore(run, shapes_of(MATERIAL), stage)

        requests = sum(answer["requests"] for answer in found)
        assert requests <= REQUESTS_OF_ANY + (REQUESTS_A_RANK + REQUESTS_A_FILE) * size
