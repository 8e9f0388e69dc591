"""The same bits at any world size, by real engines on gloo: see test_gradient_tree for the sums alone."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from zero_groups import WorkerGroup
from zero_material import commit_parts

from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.step.exact_gradients import norm_of, norm_words
from pipeline.store.storage import Storage

STEPS = 4
CLIPPED = 0.05


def recipe(stage: int = 1, **changes: object) -> Recipe:
    """Twelve grains of two images."""
    return named_recipe("tiny").amended(
        {
            "model.image_size": 32,
            "model.depth": [1, 1, 1],
            "model.decoder_depth": 1,
            "zero_stage": stage,
            "global_batch_size": 24,
            "lanes": 12,
            "max_workers": 12,
            "base_learning_rate": 0.05,
            **changes,
        }
    )


GROWING: dict[str, object] = {
    "model.image_size": 64,
    "epochs": STEPS,
    "warmup_epochs": 1,
    "resolution_schedule": [[0, 32], [0.5, 64]],
}
"""Each step is an epoch here, and two have small images."""


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], WorkerGroup]]:
    folder, made = tmp_path_factory.mktemp("exact"), []

    @functools.cache
    def group(world_size: int) -> WorkerGroup:
        made.append(WorkerGroup(world_size, folder))
        return made[-1]

    for world_size in (1, 2, 3):  # side by side
        group(world_size)
    yield group
    for each in made:
        each.close()
    shutil.rmtree(folder)


def trained(group: WorkerGroup, recipe: Recipe, actions: list[str]) -> tuple[list[float], list[float], list[str]]:
    losses = group.train(recipe, actions)
    return losses, group.norms, group.digests


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"clip_grad_norm": CLIPPED}, id="fp32"),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"model.views": 4}, id="four views"),
        pytest.param({**GROWING, "clip_grad_norm": CLIPPED}, id="larger images"),
        pytest.param(
            {**GROWING, "precision": "bf16", "model.position": "learned"}, id="learned", marks=pytest.mark.slow
        ),
        pytest.param({}, id="not clipped", marks=pytest.mark.slow),
        pytest.param({"lanes": 24, "grain_size": 1}, id="smaller grains", marks=pytest.mark.slow),
        pytest.param({"recompute": ["stage3", "decoder"]}, id="recomputed", marks=pytest.mark.slow),
        pytest.param({"grain_size": 4, "max_workers": 6}, id="larger grains", marks=pytest.mark.slow),
    ],
)
def test_losses_norms_and_digests_have_the_same_bits_at_every_world_size(
    groups: Callable[[int], WorkerGroup], changes: dict[str, object]
) -> None:
    alone = trained(groups(1), recipe(**changes), ["train"] * STEPS)
    assert len(set(alone[2])) == STEPS
    if "clip_grad_norm" in changes:
        assert min(alone[1]) > CLIPPED, "else nothing was clipped"

    for world_size, stage in ((2, 2), (3, 1)):
        assert trained(groups(world_size), recipe(stage, **changes), ["train"] * STEPS) == alone, (world_size, stage)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="one size"), pytest.param(GROWING, id="larger images", marks=pytest.mark.slow)],
)
def test_verified_steps_have_the_same_bits_and_no_rank_is_blamed(
    groups: Callable[[int], WorkerGroup], changes: dict[str, object]
) -> None:
    """Of one rank, of two and of three, which find their three digests in different ways."""
    alone = trained(groups(1), recipe(**changes), ["train"] * STEPS)

    for world_size, stage in ((1, 1), (2, 2), (3, 1)):
        verified = recipe(stage, **changes, verify_steps_every=1)
        assert trained(groups(world_size), verified, ["train"] * STEPS) == alone, world_size


@pytest.mark.slow
def test_five_ranks_which_divide_no_number_of_grains_have_the_same_bits(groups: Callable[[int], WorkerGroup]) -> None:
    changes = {"clip_grad_norm": CLIPPED}

    alone = trained(groups(1), recipe(**changes), ["train"] * STEPS)
    assert trained(groups(5), recipe(2, **changes), ["train"] * STEPS) == alone


def test_another_grain_has_other_bits(groups: Callable[[int], WorkerGroup]) -> None:
    digests = [trained(groups(1), recipe(grain_size=size), ["train"])[2] for size in (1, 2)]

    assert digests[0] != digests[1], "the digests could not tell them apart"


def test_a_step_that_is_discarded_leaves_no_trace(groups: Callable[[int], WorkerGroup]) -> None:
    _, _, calm = trained(groups(1), recipe(), ["train", "train"])
    _, norms, found = trained(groups(3), recipe(2), ["train", "gradient", "loss", "train"])

    assert found == [calm[0], calm[0], calm[0], calm[1]]
    assert norms[1] == math.inf


@pytest.mark.parametrize(
    ("writer", "reader", "step", "changes"),
    [
        pytest.param(2, 3, 2, {}, id="2 to 3"),
        pytest.param(3, 1, 2, {}, id="3 to 1"),
        pytest.param(2, 3, 1, GROWING, id="before a change of size", marks=pytest.mark.slow),
        pytest.param(3, 2, 2, GROWING, id="at a change of size"),
        pytest.param(1, 3, 3, GROWING, id="after a change of size", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_at_another_world_size_with_the_same_bits(
    groups: Callable[[int], WorkerGroup],
    writer: int,
    reader: int,
    step: int,
    changes: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    _, _, calm = trained(groups(1), recipe(**changes), ["train"] * STEPS)
    folder = tmp_path_factory.mktemp("saved") / "step"
    trained(groups(writer), recipe(2, **changes), [*(["train"] * step), str(folder)])
    run = RunDirectory.of(Storage(), str(folder.parent / "runs"), "resized")
    commit_parts(run, recipe(2, **changes), folder, step=step, stage=2, world_size=writer, chunk_bytes=1 << 12)

    groups(reader).train(recipe(1, **changes), ["train"] * (STEPS - step), resume=run)

    assert groups(reader).digests == calm[step:]


def test_larger_images_train_alike_where_weights_are_sharded(groups: Callable[[int], WorkerGroup]) -> None:
    """ZeRO 3 gathers positions before they are interpolated; its sums are the same within rounding."""
    changes = {**GROWING, "model.position": "learned", "base_learning_rate": 0.01, "reproducible": "rounding"}
    alone = groups(1).train(recipe(**changes), ["train"] * STEPS)

    assert groups(2).train(recipe(3, **changes), ["train"] * STEPS) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes minutes
def test_a_compiled_run_has_the_same_bits_whether_it_was_resumed_after_a_change_of_size_or_not(tmp_path: Path) -> None:
    """In processes of their own, since what one has compiled decides what it compiles next."""
    compiled, saved = recipe(**GROWING, compile=True), tmp_path / "saved" / "step"
    for name in ("calm", "resumed"):
        (tmp_path / name).mkdir()
    calm, resumed = WorkerGroup(1, tmp_path / "calm"), WorkerGroup(1, tmp_path / "resumed")
    _, _, digests = trained(calm, compiled, ["train", "train", str(saved), "train", "train"])
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "compiled")
    commit_parts(run, compiled, saved, step=2, stage=1, world_size=1, chunk_bytes=1 << 12)

    resumed.train(compiled, ["train", "train"], resume=run)

    assert resumed.digests == digests[2:]
    for group in (calm, resumed):
        group.close()


def test_the_norm_is_that_of_float64_and_does_not_depend_on_how_values_are_dealt() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_003, generator=generator) * torch.logspace(-12, 2, 100_003)

    whole = norm([values], len(values))
    assert whole == pytest.approx(float(values.double().norm()), rel=1e-9)
    for cuts in ([7], [1, 50_000], [3, 4, 99_999]):
        assert norm(torch.tensor_split(values, cuts), len(values)) == whole
    filled_up = torch.cat([values, torch.zeros(1 << 17)])
    assert norm([filled_up], len(values)) == whole, "as much as a world size may ask for"
    assert norm([torch.zeros(3)], 3) == 0.0
    for bad in (math.nan, math.inf, -math.inf):
        assert norm([torch.tensor([1.0, bad])], 2) == math.inf


def norm(partitions: Sequence[torch.Tensor], elements: int) -> float:
    return norm_of(norm_words(partitions, elements, rank=0, all_reduce=alone).tolist(), elements)


def alone(tensor: torch.Tensor, op: object = None) -> None:
    """All-reduce of one rank."""


def test_an_optimizers_step_is_on_the_device_of_its_moments() -> None:
    """Fused AdamW refuses any other on a GPU; `meta` stands for one."""
    from jobs.checkpoint import zero_state

    flat = torch.nn.Parameter(torch.zeros(3, device="meta"))
    slots: dict[str, torch.Tensor] = {}
    state = SimpleNamespace(owned={}, weights={}, moments={}, optimizer_step=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_state, "owned_slices", lambda engine: [(flat, [])])
        patch.setattr(zero_state, "adam_slots", lambda engine, of: slots)
        zero_state.restore_optimizer(SimpleNamespace(), state)  # type: ignore[arg-type]

    assert {slots[name].device.type for name in ("step", "exp_avg", "exp_avg_sq")} == {"meta"}
