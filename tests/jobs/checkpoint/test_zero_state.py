"""Checkpoints of real DeepSpeed engines on gloo, read and resumed at other world sizes."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from whole_state import MASTER, MOMENTS, WholeState, whole_state
from zero_groups import WorkerGroup
from zero_material import commit_parts, commit_zero_files

from jobs.checkpoint.commit import Commit
from jobs.checkpoint.zero_state import ZeroState, owned_ranges, restore_optimizer
from jobs.consolidation.consolidate import consolidate
from jobs.errors import CheckpointError
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.step.engine import parameter_groups
from jobs.weights import consolidated
from model import ConvMAE
from model.config import PARTS
from pipeline.store.storage import Storage

STAGES = (1, 2, 3)
WORLD_SIZES = (1, 2, 3)
CHUNK_BYTES = 1 << 12
"""So small that what is read for whole chunks is little beside what is needed of this model."""
RESIZES = [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)]


def recipe(stage: int, precision: str = "fp32") -> Recipe:
    """The smallest model in which ZeRO 3 shards some parameters (100,000 values and more) and keeps others whole."""
    return named_recipe("tiny").amended(
        {
            "model.preset": "tiny",
            "model.image_size": 32,
            "model.depth": [1, 1, 1],
            "model.decoder_depth": 1,
            "zero_stage": stage,
            "precision": precision,
            "global_batch_size": 6,
            "lanes": 6,
            "micro_batch_size": 3,
            "base_learning_rate": 0.05,
            "clip_grad_norm": 1.0,
            "reproducible": "rounding",
        }
    )


@dataclass(frozen=True)
class Saved:
    """A run of two steps, and of a third at the same world size."""

    folder: Path
    """Has what each rank saved; below `deepspeed` what DeepSpeed saved of the same state."""
    run: RunDirectory
    commit: Commit
    """Of its one checkpoint."""
    older_run: RunDirectory
    """Its one checkpoint holds DeepSpeed's files."""
    state: WholeState
    """After two steps."""
    next_state: WholeState
    """After three."""
    losses: list[float]


class Runs:
    """Worker groups and what they saved; both made when a test first asks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.group = functools.cache(lambda world_size: WorkerGroup(world_size, folder))
        self.saved = functools.cache(self._saved)

    def _saved(self, recipe_json: str, world_size: int) -> Saved:
        recipe = Recipe.from_json(json.loads(recipe_json))
        name = f"{recipe.precision}-zero{recipe.zero_stage}-of-{world_size}"
        folder, after = self.folder / f"{name}-step2", self.folder / f"{name}-step3"
        losses = self.group(world_size).train(recipe, ["train", "train", str(folder), "train", str(after)])
        run, older = (RunDirectory.of(Storage(), str(self.folder / kind), name) for kind in ("runs", "older"))
        fields: dict[str, Any] = {
            "step": 2, "stage": recipe.zero_stage, "world_size": world_size, "chunk_bytes": CHUNK_BYTES,
        }  # fmt: skip
        commit = commit_parts(run, recipe, folder, **fields)
        commit_zero_files(older, recipe, folder / "deepspeed", **fields)
        return Saved(folder, run, commit, older, whole_state(folder), whole_state(after), losses)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("zero"))
    for world_size in WORLD_SIZES:  # all at once: they start side by side
        runs.group(world_size)
    yield runs
    for world_size in WORLD_SIZES:
        runs.group(world_size).close()
    shutil.rmtree(runs.folder)


def saved(runs: Runs, world_size: int, stage: int, precision: str = "fp32") -> Saved:
    return runs.saved(json.dumps(recipe(stage, precision).to_json()), world_size)


def assert_bit_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def assert_same_state(found: WholeState, expected: WholeState) -> None:
    assert found.tensors.keys() == expected.tensors.keys() == {MASTER, *MOMENTS}
    for kind in expected.tensors:
        assert_bit_equal(found.tensors[kind], expected.tensors[kind])
    assert_bit_equal(found.fixed, expected.fixed)
    assert found.optimizer_step == expected.optimizer_step


def expected_fixed(recipe: Recipe) -> dict[str, Tensor]:
    """What no step changes: DeepSpeed's own tool forgets the frozen parameters of ZeRO 1."""
    model = ConvMAE(recipe.model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in trained}


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Euclidean, over all values."""
    return math.sqrt(sum((found[name] - expected[name]).double().square().sum().item() for name in expected))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_bit_equal_to_deepspeeds_own(runs: Runs, stage: int, world_size: int) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run = saved(runs, world_size, stage)

    own = get_fp32_state_dict_from_zero_checkpoint(str(run.folder), tag="deepspeed")
    assert_bit_equal(run.state.weights(), {**expected_fixed(recipe(stage)), **own})
    assert run.state.optimizer_step == 2
    assert all(tensor.abs().sum() > 0 for kind in MOMENTS for tensor in run.state.tensors[kind].values())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_consolidated_file_holds_the_same_weights(runs: Runs, stage: int, world_size: int) -> None:
    """Of a checkpoint of ours, and of DeepSpeed's own files: what `zero_to_fp32` makes of the same engine's."""
    saved_run = saved(runs, world_size, stage)

    for run in (saved_run.run, saved_run.older_run):
        consolidate(run, part_bytes=1 << 17)

        assert_bit_equal(consolidated.of_run(run, 2).tensors, saved_run.state.weights())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_ranks_file_is_plain_safetensors(runs: Runs, stage: int, world_size: int) -> None:
    """Any reader of that format finds the values, by names and metadata alone."""
    run = saved(runs, world_size, stage)
    kinds = {"weight": MASTER, **{moment: moment for moment in MOMENTS}}
    seen = dict.fromkeys(("fixed", *kinds), 0)

    for path in run.folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                kind, _, name = key.partition("/")
                said = json.loads(file.metadata()[name])
                expected = run.state.fixed[name] if kind == "fixed" else run.state.tensors[kinds[kind]][name]
                assert list(expected.shape) == said["shape"]
                assert torch.equal(file.get_tensor(key), expected.reshape(-1)[slice(*said["range"])])
                seen[kind] += len(file.get_tensor(key))

    elements = {kind: sum(map(torch.numel, run.state.tensors[name].values())) for kind, name in kinds.items()}
    assert seen == {"fixed": sum(map(torch.numel, run.state.fixed.values())), **elements}


@pytest.mark.parametrize("stage", STAGES)
def test_world_sizes_and_stages_train_the_same_weights(runs: Runs, stage: int) -> None:
    reference = saved(runs, 1, 1)

    for world_size in WORLD_SIZES:
        run = saved(runs, world_size, stage)
        assert run.losses == pytest.approx(reference.losses, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("before", "now"), RESIZES)
def test_a_checkpoint_resumes_exactly_at_another_world_size(runs: Runs, stage: int, before: int, now: int) -> None:
    run = saved(runs, before, stage)
    name = f"zero{stage}-from-{before}-to-{now}"
    again, after = runs.folder / name, runs.folder / f"{name}-step3"

    for older_or_not in (run.older_run, run.run):
        shutil.rmtree(again, ignore_errors=True)
        shutil.rmtree(after, ignore_errors=True)
        losses = runs.group(now).train(recipe(stage), [str(again), "train", str(after)], resume=older_or_not)
        assert_same_state(whole_state(again), run.state)
    assert losses == pytest.approx(run.losses[2:], rel=1e-6)
    continued = whole_state(after)
    for kind, rtol in [("exp_avg", 1e-5), (MASTER, 1e-3)]:  # AdamW magnifies rounding where gradients are all but zero
        moved = distance(run.next_state.tensors[kind], run.state.tensors[kind])
        assert distance(continued.tensors[kind], run.next_state.tensors[kind]) < rtol * moved
    assert continued.optimizer_step == 3


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("before", "now"), RESIZES)
def test_each_rank_reads_its_part_and_all_of_them_everything(runs: Runs, stage: int, before: int, now: int) -> None:
    run = saved(runs, before, stage)
    group = runs.group(now)

    group.train(recipe(stage), [], resume=run.run)

    surplus = 2 * CHUNK_BYTES * len(run.commit.tensors)  # at the ends of ranges
    for rank, found in enumerate(group.read_bytes):
        assert found < run.commit.bytes / now + surplus, rank
    assert sum(group.read_bytes) >= run.commit.bytes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2, 5, 64, 1000])
def test_every_value_is_owned_by_one_rank(stage: int, world_size: int) -> None:
    model = ConvMAE(recipe(stage).model)
    groups = parameter_groups(model, weight_decay=0.05)

    by_rank = [owned_ranges(model, groups, stage=stage, rank=rank, world_size=world_size) for rank in range(world_size)]

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ranges = [owned[name] for owned in by_rank if owned[name]]
            edges = [0, *(values.stop for values in ranges)]
            assert [values.start for values in ranges] == edges[:-1], name
            assert edges[-1] == parameter.numel(), name
    by_size = sorted(sum(map(len, owned.values())) for owned in by_rank)
    assert by_size[-1] <= sum(by_size) / world_size + len(by_rank[0])


def test_an_engine_that_owns_other_ranges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(4, 1, bias=False)
    optimizer = SimpleNamespace(
        single_partition_of_fp32_groups=[torch.zeros(2)],
        real_dp_process_group=[None],
        round_robin_bit16_groups=[[module.weight]],
    )
    engine: Any = SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    state = ZeroState({"weight": torch.zeros(1, 4)}, {"weight": range(2)}, {}, 1.0)

    with pytest.raises(CheckpointError, match="must partition the optimizer's state as"):
        restore_optimizer(engine, state)


@pytest.mark.parametrize("stage", STAGES)
def test_recomputing_every_part_trains_the_same_weights(runs: Runs, stage: int) -> None:
    recomputing = recipe(stage).amended({"recompute": list(PARTS)})

    losses = runs.group(2).train(recomputing, ["train"] * 3)

    assert losses == saved(runs, 2, stage).losses


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_discarded_leaves_no_trace(runs: Runs, stage: int, precision: str) -> None:
    """NaN on one rank alone, in the loss or in a gradient, is seen by all; weights, moments and counts stay."""
    undisturbed = saved(runs, 2, stage, precision)
    folder = runs.folder / f"{precision}-zero{stage}-discarded"
    before, kept, after = folder / "before", folder / "kept", folder / "after"

    steps = ["train", "loss", "train", str(before), "loss", "gradient", str(kept), "train", str(after)]
    losses = runs.group(2).train(recipe(stage, precision), steps)

    assert losses == pytest.approx(undisturbed.losses, rel=1e-6)
    assert_same_state(whole_state(kept), whole_state(before))
    continued = whole_state(after)
    assert continued.optimizer_step == 3
    moved = distance(undisturbed.next_state.tensors["exp_avg"], undisturbed.state.tensors["exp_avg"])
    assert distance(continued.tensors["exp_avg"], undisturbed.next_state.tensors["exp_avg"]) < 1e-5 * moved


@pytest.mark.slow
@pytest.mark.timeout(1200)  # compiling takes minutes
@pytest.mark.parametrize("stage", [1, 2])
def test_a_compiled_model_trains_the_same_weights(runs: Runs, stage: int) -> None:
    losses = runs.group(2).train(recipe(stage).amended({"compile": True}), ["train"] * 3)

    assert losses == pytest.approx(saved(runs, 2, stage).losses, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_mae_trains_the_same_at_every_stage_and_world_size(runs: Runs, stage: int) -> None:
    model = {"model.embed_dim": [0, 0, 192], "model.depth": [0, 0, 1], "model.fusion": False}

    reference = runs.group(1).train(recipe(1).amended(model), ["train"] * 2)
    losses = runs.group(3).train(recipe(stage).amended(model), ["train"] * 2)

    assert losses == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_weights_resume_exactly_from_fp32_masters(runs: Runs, stage: int) -> None:
    run = saved(runs, 2, stage, "bf16_pure")
    again = runs.folder / f"bf16_pure-zero{stage}"

    runs.group(1).train(recipe(stage, "bf16_pure"), [str(again)], resume=run.run)

    assert_same_state(whole_state(again), run.state)
    masters = run.state.tensors[MASTER]
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters.values())
