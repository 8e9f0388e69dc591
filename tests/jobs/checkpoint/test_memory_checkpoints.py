"""Memory checkpoints, with real holders on a Ray cluster of this machine; ranks are threads here, or processes of their
own where they are killed. Whole runs lose ranks and nodes in tests/jobs/control."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from patience import wait_until
from rank_threads import Ranks
from ray_here import ray_here
from zero_material import Material, commit_state, random_material, state_parts

from jobs.checkpoint import rank_group
from jobs.checkpoint.commit import CHUNK_BYTES, CheckpointFile, Commit
from jobs.checkpoint.held.held_checkpoint import HeldCheckpoint, copies_of, end_holders, find_holder
from jobs.checkpoint.held.holder import HELD_FILE, Holding, MemoryHolder, Part, holder_name
from jobs.checkpoint.held.memory_clock import MemoryClock
from jobs.checkpoint.held.memory_keeper import MemoryKeeper, partner_of
from jobs.checkpoint.rank_file import CopyRoom, RankPart
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.restore import InMemory, Restored, restore_newest
from jobs.checkpoint.zero_state import owned_ranges
from jobs.control.memory_findings import memory_findings
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.host.memory_file import MemoryFile
from pipeline.store.storage import Storage

MATERIAL = random_material(600_000, tensor_elements=200_000)
OTHER = random_material(600_000, seed=1, tensor_elements=200_000)
RANK_FILE = "convmae-checkpoint"


@pytest.fixture(scope="module", autouse=True)
def _cluster(token_of_this_process: str) -> Iterator[None]:
    with ray_here(token_of_this_process, num_cpus=1, namespace="convmae"):
        yield


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")


@pytest.fixture
def hold_on(run: RunDirectory) -> Iterator[Callable[..., list[Any]]]:
    """Starts holders, as of nodes with these names."""
    handles: list[Any] = []

    def start(*nodes: str, free: int = 1 << 30) -> list[Any]:
        actor: Any = ray.remote(MemoryHolder)
        new = [
            actor.options(name=holder_name(run.url, node), num_cpus=0).remote(run.url, lambda: free) for node in nodes
        ]
        handles.extend(new)
        return new

    yield start
    for handle in handles:
        ray.kill(handle)


class Monitor:
    """Notes what rank 0 reports."""

    def __init__(self) -> None:
        self.held: list[HeldCheckpoint] = []
        self.failed: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*values: Any, **fields: Any) -> None:
                if name == "memory_held":
                    self.held.extend(values)
                else:
                    self.failed.append(fields)

        return Method


def commit(step: int, world_size: int, attempt: int = 1) -> Commit:
    recipe = named_recipe("tiny")
    return Commit(
        step=step, epoch=0, world_size=world_size, zero_stage=2, precision="fp32", recipe_digest=recipe.digest(),
        dataset_digest="d" * 64, order_version=1, seed=0, attempt=attempt, created_at_seconds=1.0, milestone=False,
        counters={}, versions={}, files=(), claim=3,
    )  # fmt: skip


def in_memory(part: RankPart) -> RankPart:
    """The part as a rank has it: in a memory file."""
    file = MemoryFile(RANK_FILE, len(part.content))
    file.memory[:] = part.content
    return replace(part, room=CopyRoom(file.path, memoryview(file.memory), file))


class Group:
    """Ranks in threads, each with its keeper."""

    def __init__(
        self, run: RunDirectory, nodes: Sequence[str], monkeypatch: pytest.MonkeyPatch, *, every: int = 1
    ) -> None:
        self.monitor, self.nodes = Monitor(), nodes
        self._ranks = Ranks(len(nodes))
        monkeypatch.setattr(rank_group, "dist", self._ranks)
        self.keepers = [
            MemoryKeeper(
                run.url, self.monitor, RankGroup(rank, len(nodes)), nodes,
                every=every, part_bytes=1, whole=None, wait=lambda reply: reply and ray.get(reply),
            )
            for rank in range(len(nodes))
        ]  # fmt: skip

    def keep(self, step: int, material: Material = MATERIAL) -> HeldCheckpoint | None:
        """Have all ranks keep their parts; returns what rank 0 reported, if it did."""
        world_size, before = len(self.nodes), len(self.monitor.held)
        parts = [in_memory(part) for part in state_parts(material, 2, world_size)]

        def keep(rank: int) -> None:
            self.keepers[rank].begin(commit(step, world_size), parts[rank], 0.0)
            self.keepers[rank].settle(step)

        self._ranks.run(keep)
        return self.monitor.held[-1] if len(self.monitor.held) > before else None


@pytest.fixture
def group(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Group]:
    return lambda *nodes, **options: Group(run, nodes, monkeypatch, **options)


@pytest.fixture
def restored(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Restores on so many ranks: what each got, and what was reported on rank 0."""

    def restore(held: HeldCheckpoint, world_size: int, here: str) -> tuple[list[Restored | None], list[Any]]:
        ranks, passed_over = Ranks(world_size), []
        monkeypatch.setattr(rank_group, "dist", ranks)
        found = ranks.run(
            lambda rank: restore_newest(
                run, owned(rank, world_size), RankGroup(rank, world_size), check=lambda _: None,
                on_damage=lambda *what: passed_over.append(what),
                in_memory=InMemory(held, copies_of(run.url, held, here)),
            )
        )  # fmt: skip
        return found, passed_over

    return restore


def owned(rank: int, world_size: int) -> dict[str, range]:
    class Model:
        @staticmethod
        def named_parameters() -> list[Any]:
            return [pair for group in MATERIAL.groups for pair in group.items()]

    groups = [{"params": list(group.values())} for group in MATERIAL.groups]
    return owned_ranges(Model, groups, stage=2, rank=rank, world_size=world_size)  # type: ignore[arg-type]


def assert_is(found: Sequence[Restored | None], material: Material, source: str, step: int) -> None:
    trained = {name: value for group in material.groups for name, value in group.items()}
    for rank, restored in enumerate(found):
        assert restored is not None
        assert (restored.source, restored.commit.step) == (source, step)
        for name, value in trained.items():
            assert torch.equal(restored.state.weights[name], value), name
        for name, values in owned(rank, len(found)).items():
            flat = trained[name].reshape(-1)[values.start : values.stop]
            assert torch.equal(restored.state.moments["exp_avg"][name], flat * 0.5), name
            assert torch.equal(restored.state.moments["exp_avg_sq"][name], flat.square()), name


def holding(handle: Any) -> Holding:
    found: Holding = ray.get(handle.holding.remote())
    return found


def flip_in_memory(handle: Any, name: str) -> None:
    """Flip a bit in every part of a kind that a holder has, from outside."""
    process = psutil.Process(holding(handle).pid)
    done = 0
    for place in process.memory_maps(grouped=False):
        if name in place.path:
            begin, end = (int(side, 16) for side in place.addr.split("-"))
            path = Path(f"/proc/{process.pid}/map_files/{begin:x}-{end:x}")
            with path.open("r+b", buffering=0) as file:
                file.seek(100_000)
                (byte,) = file.read(1)
                file.seek(100_000)
                file.write(bytes([byte ^ 4]))
            done += 1
    assert done, f"nothing named {name} is mapped"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_world_size_restores_from_memory_to_the_bit(
    hold_on: Any, group: Any, restored: Any, world_size: int
) -> None:
    hold_on("a", "b")
    held = group("a", "a", "b").keep(7)

    found, passed_over = restored(held, world_size, here="b")

    assert_is(found, MATERIAL, "memory", 7)
    assert not passed_over
    assert held.nodes == (("a", "b"), ("a", "b"), ("b", "a"))


def test_the_newer_of_memory_and_store_counts(hold_on: Any, group: Any, restored: Any, run: RunDirectory) -> None:
    hold_on("a")
    held = group("a").keep(7)
    commit_state(run, named_recipe("tiny"), OTHER, step=6, stage=2, world_size=2)
    assert_is(restored(held, 2, here="a")[0], MATERIAL, "memory", 7)

    commit_state(run, named_recipe("tiny"), OTHER, step=8, stage=2, world_size=2)
    assert_is(restored(held, 2, here="a")[0], OTHER, "store", 8)


def test_a_flipped_byte_is_found_and_the_other_copy_read(
    hold_on: Any, group: Any, restored: Any, run: RunDirectory
) -> None:
    first, second = hold_on("a", "b")
    held = group("a", "b").keep(7)
    commit_state(run, named_recipe("tiny"), OTHER, step=6, stage=2, world_size=2)
    flip_in_memory(first, RANK_FILE)  # the part of rank 0, as rank 0 wrote it

    found, passed_over = restored(held, 2, here="a")

    assert_is(found, MATERIAL, "memory", 7)
    assert not passed_over

    flip_in_memory(second, HELD_FILE)  # its copy
    found, passed_over = restored(held, 2, here="a")

    assert_is(found, OTHER, "store", 6)
    ((step, why, source),) = passed_over
    assert (step, source) == (7, "memory")
    assert "rank-00000.safetensors" in why
    assert "it was altered" in why


def test_a_lost_node_is_made_up_for_and_two_are_not(hold_on: Any, group: Any, restored: Any, run: RunDirectory) -> None:
    first, second, _ = hold_on("a", "b", "c")
    held = group("a", "b", "c").keep(7)
    commit_state(run, named_recipe("tiny"), OTHER, step=6, stage=2, world_size=2)
    os.kill(holding(first).pid, signal.SIGKILL)

    assert_is(restored(held, 2, here="c")[0], MATERIAL, "memory", 7)

    os.kill(holding(second).pid, signal.SIGKILL)
    found, passed_over = restored(held, 2, here="c")

    assert_is(found, OTHER, "store", 6)
    assert "it is missing" in passed_over[0][1]


def test_what_a_killed_rank_wrote_stays(hold_on: Any, run: RunDirectory) -> None:
    (handle,) = hold_on("a")
    text = (
        "import sys, time; from pipeline.host.memory_file import MemoryFile\n"
        "file = MemoryFile('convmae-checkpoint', 1000); file.memory[:] = bytes(range(250)) * 4\n"
        "print(file.path, flush=True); time.sleep(600)"
    )
    rank = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert rank.stdout
    path = rank.stdout.readline().strip()
    part = Part("step-00000007/000003-0001", "rank-00000.safetensors")
    held: CheckpointFile = ray.get(handle.hold.remote(part, path, CheckpointFile(part.file, 0, 0), ""))
    rank.kill()
    rank.wait()

    assert not Path(path).exists()
    data: np.ndarray[Any, Any] = ray.get(handle.read.remote(part, 0, 10_000))
    assert data.tobytes() == bytes(range(250)) * 4
    assert held.bytes == 1000


def test_only_the_newest_and_the_one_being_made_are_kept(hold_on: Any, group: Any) -> None:
    first, _ = hold_on("a", "b")
    ranks = group("a", "b")
    sizes = []
    for step in range(1, 6):
        assert ranks.keep(step).commit.step == step
        sizes.append(holding(first).bytes)

    assert sizes[1:] == [2 * sizes[0]] * 4  # the one before stays until the next has begun


def test_without_memory_for_it_training_continues_without(hold_on: Any, group: Any) -> None:
    hold_on("a", "b", free=1_000_000)
    ranks = group("a", "b")

    assert ranks.keep(1) is None
    assert ranks.keep(2) is None

    (failed,) = ranks.monitor.failed
    assert failed["is_off"]
    assert "HolderFullError: memory checkpoints of a node: must hold at most 500,000 bytes" in failed["error"]
    assert "memory_checkpoint_every_steps=0" in failed["error"]
    assert not ranks.keepers[0].is_due(100)


def test_a_holder_that_dies_costs_one_checkpoint_and_the_one_before_counts(
    hold_on: Any, group: Any, run: RunDirectory
) -> None:
    (first,) = hold_on("a")
    hold_on("b")
    ranks = group("a", "b")
    assert ranks.keep(1)
    os.kill(holding(first).pid, signal.SIGKILL)

    assert ranks.keep(2) is None

    (failed,) = ranks.monitor.failed
    assert failed["step"] == 2
    assert not failed["is_off"]
    assert failed["error"].startswith("rank 0: ActorDied")
    assert [held.commit.step for held in ranks.monitor.held] == [1]


def test_what_changes_on_the_way_to_another_node_is_refused(hold_on: Any, run: RunDirectory) -> None:
    class Noisy:
        async def read(self, part: Part, offset: int, length: int) -> Any:  # noqa: ARG002
            return np.zeros(length, np.uint8)

    (handle,) = hold_on("a")
    other: Any = ray.remote(Noisy)
    source, part = other.remote(), Part("step-00000007/000003-0001", "rank-00000.safetensors")
    file = CheckpointFile(part.file, 2 * CHUNK_BYTES, 0, CHUNK_BYTES, "0000000000000001")

    with pytest.raises(Exception, match="must arrive as it was sent, and differs from byte 0"):
        ray.get(handle.copy.remote(part, source, file, ""))

    assert holding(handle).bytes == 0
    ray.kill(source)


def test_holders_are_ended_and_those_that_are_gone_do_not_matter(hold_on: Any, group: Any, run: RunDirectory) -> None:
    (first,) = hold_on("a")
    group("a").keep(1)
    process = psutil.Process(holding(first).pid)

    end_holders(run.url, ["nobody", "a"])

    process.wait(20)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        find_holder(holder_name(run.url, "a"))


def test_the_doctor_counts_what_is_held(hold_on: Any, group: Any, run: RunDirectory) -> None:
    node = ray.get_runtime_context().get_node_id()
    (finding,) = memory_findings()
    assert finding.detail == "none: no run holds any"
    (handle,) = hold_on(node)
    group(node).keep(1)

    (finding,) = memory_findings()

    assert finding.level == "ok"
    assert "7.21 MB of at most 537 MB" in finding.detail
    assert f"in 1 parts of {run.url} (pid {holding(handle).pid})" in finding.detail


def test_partners_are_neighbours_in_a_ring() -> None:
    assert [partner_of(node, ["a", "a", "b", "c"]) for node in "abc"] == ["b", "c", "a"]
    assert partner_of("a", ["a", "a"]) is None


def test_a_holder_is_found_by_run_and_node(run: RunDirectory, hold_on: Any) -> None:
    hold_on("a")
    assert find_holder(holder_name(run.url, "a"))
    with pytest.raises(ValueError, match="Failed to look up actor"):
        find_holder(holder_name(run.url, "b"))


def due(
    clock: MemoryClock, steps: int, *, lag: int = 0, stall: float = 0.0, step_seconds: float = 1.0, slower: float = 1.0
) -> list[int]:
    """After which steps a clock has the ranks keep their state, if each is whole `lag` steps later.

    Those steps take `slower` times as long as the others.
    """
    found: list[int] = []
    for step in range(1, steps + 1):
        beside = bool(found) and step <= found[-1] + lag
        clock.stepped(step_seconds * (slower if beside else 1), beside=beside)
        if beside and step == found[-1] + lag:
            clock.ended(step, stall)
        if not (found and step < found[-1] + lag) and clock.is_due(step):
            clock.began(step)
            found.append(step)
            if not lag:
                clock.ended(step, stall)
    return found


def test_every_so_many_steps() -> None:
    assert due(MemoryClock(1, 1), 4) == [1, 2, 3, 4]
    assert due(MemoryClock(5, 1), 22) == [5, 10, 15, 20]


def test_it_begins_so_early_that_it_is_whole_in_time() -> None:
    found = due(MemoryClock(10, 1), 100, lag=3)

    assert found[0] == 10
    assert {after - before for before, after in pairwise(found[1:])} == {7}


def test_by_itself_it_costs_a_hundredth_of_the_time() -> None:
    found = due(MemoryClock("auto", 1), 1000, lag=3, stall=0.5, step_seconds=2.0)

    assert {after - before for before, after in pairwise(found[9:])} == {25}  # 0.5 s of 50 s


def test_what_steps_beside_it_take_longer_counts() -> None:
    found = due(MemoryClock("auto", 1), 1000, lag=3, stall=0.1, step_seconds=2.0, slower=1.15)

    assert {after - before for before, after in pairwise(found[9:])} == {50}  # 0.1 s and 3 times 0.3 s of 100 s


def test_steps_that_happen_to_be_shorter_beside_it_do_not_make_it_cheaper() -> None:
    found = due(MemoryClock("auto", 1), 1000, lag=3, stall=0.5, step_seconds=2.0, slower=0.9)

    assert {after - before for before, after in pairwise(found[9:])} == {25}


def test_the_steps_that_a_checkpoint_was_under_way_in_are_those_beside_it(hold_on: Any, group: Any) -> None:
    hold_on("a")
    ranks = group("a", every="auto")
    (keeper,) = ranks.keepers
    for step in range(1, 10):
        keeper.stepped(1.0, step, holding=False)

    keeper.begin(commit(9, 1), in_memory(state_parts(MATERIAL, 2, 1)[0]), 0.0)
    keeper.stepped(2.5, 10, holding=True)
    keeper.stepped(2.5, 11, holding=False)

    assert ranks.monitor.held
    # 3 s more; the median with the guess before the first one, of nothing, is 1.5 s: 1 % of 150 steps.
    assert not keeper.is_due(9 + 150)
    assert keeper.is_due(9 + 1000)


def test_time_is_not_waited_for(hold_on: Any, group: Any) -> None:
    """Handing over returns before a holder has done anything."""
    hold_on("a", "b")
    ranks = group("a", "b")
    part = in_memory(state_parts(MATERIAL, 2, 2)[0])
    ranks.keepers[0].begin(commit(1, 2), part, 0.0)
    began = time.monotonic()
    assert ranks.keepers[0].is_under_way
    wait_until("the part to be held", lambda: not ranks.keepers[0].is_holding, 30)
    assert time.monotonic() - began < 30
    assert not ranks.monitor.held  # rank 0 reports what all ranks have finished
