"""The actors that hold memory checkpoints, from one worker group to the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray_here import ray_here

from jobs.checkpoint.held.held_checkpoint import end_holders, find_holder
from jobs.checkpoint.held.holder import Holding, holder_name
from jobs.control.memory_holders import MemoryHolders
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage


@pytest.fixture(scope="module", autouse=True)
def _cluster(token_of_this_process: str) -> Iterator[None]:
    with ray_here(token_of_this_process, num_cpus=1, namespace="convmae"):
        yield


def begun(folder: Path, **fields: Any) -> RunDirectory:
    run = RunDirectory.of(Storage(), str(folder / "runs"), "first")
    run.claim(named_recipe("tiny").amended(fields))
    return run


def group() -> Any:
    """Two workers on this node."""
    worker = SimpleNamespace(metadata=SimpleNamespace(node_id=ray.get_runtime_context().get_node_id()))
    return SimpleNamespace(get_workers=lambda: [worker, worker])


def pid_of(run: RunDirectory) -> int:
    holder = find_holder(holder_name(run.url, ray.get_runtime_context().get_node_id()))
    found: Holding = ray.get(holder.holding.remote())
    return found.pid


def test_a_holder_outlives_worker_groups_and_comes_back_where_it_was_ended(tmp_path: Path) -> None:
    run = begun(tmp_path)
    holders = MemoryHolders(run)
    holders.after_worker_group_start(group())
    first = pid_of(run)

    for _ in range(3):
        holders.after_worker_group_start(group())
        assert pid_of(run) == first

    end_holders(run.url, [ray.get_runtime_context().get_node_id()])
    holders.after_worker_group_start(group())
    assert pid_of(run) != first


def test_without_memory_checkpoints_there_is_none(tmp_path: Path) -> None:
    run = begun(tmp_path, memory_checkpoint_every_steps=0)

    MemoryHolders(run).after_worker_group_start(group())

    with pytest.raises(ValueError, match="Failed to look up actor"):
        pid_of(run)
