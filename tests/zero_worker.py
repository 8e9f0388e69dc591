"""One rank of a process group that trains a tiny ConvMAE through jobs.step.engine, as zero_groups asks it to.

Reads one JSON case a line from standard input: {recipe, resume, steps}. `resume` is the URL of a run, or empty. `steps`
is a list of "train", of "loss" and "gradient" (a step in which that is NaN on the last rank, and which is discarded),
and of folders to save into: this rank's file as runs save it, and below `deepspeed` DeepSpeed's own. Answers each case
with one line `done: {losses, read_bytes}`: of all ranks, and by this one to resume; with digests and norms of the steps
where gradients are exact.
"""

from __future__ import annotations

import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from counting_storage import CountingStorage
from steps import NoReading, PoisonedStep
from zero_material import save_part

from jobs.checkpoint.rank_file import RankFile
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.restore import restore_newest
from jobs.checkpoint.zero_state import owned_ranges, restore_optimizer
from jobs.finetune.classification import Classification
from jobs.recipe.recipe import Recipe
from jobs.recipe.resolution import resolution_at
from jobs.recipe.schedule import micro_batches, order_of
from jobs.run.directory import RunDirectory
from jobs.step.engine import (
    build_engine,
    build_model,
    discard_step,
    has_finite_gradients,
    initialize_deepspeed,
    optimizer_groups,
    set_learning_rate,
)
from jobs.step.training_step import RankPlace
from model import ConvMAEConfig
from model.noise import mask_noise
from pipeline.load.batch import Batch

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def model_at(recipe: Recipe, step: int) -> ConvMAEConfig:
    """The model of a step, each of which is an epoch here."""
    return resolution_at(recipe.resolutions, step).model


def rank_sizes(batch: int) -> list[int]:
    return [(rank + 1) * batch // WORLD_SIZE - rank * batch // WORLD_SIZE for rank in range(WORLD_SIZE)]


class ExactSteps:
    """Steps of jobs.step.training_step, on images of which each rank has those of its lanes."""

    def __init__(self, engine: Any, recipe: Recipe) -> None:
        self._order = order_of(recipe, 1000)
        place = RankPlace(RANK, WORLD_SIZE, torch.device("cpu"))
        objective = None
        if recipe.finetune:
            labels = np.arange(1000) % len(recipe.finetune.classes)
            objective = Classification(recipe, labels, engine.module, place.device)
        self._step = PoisonedStep(engine, recipe, place, self._order, reading=NoReading(), objective=objective)  # type: ignore[arg-type]
        self._recipe = recipe
        self.digests: list[str] = []
        self.norms: list[float] = []

    def train(self, step: int, poison: str = "") -> float:
        is_last = RANK == WORLD_SIZE - 1
        self._step.engine.poison[0] = math.nan if poison == "gradient" and is_last else 1.0
        self._step.is_poisoned = poison == "loss" and is_last
        lanes, size = self._order.rank_lanes(RANK, WORLD_SIZE), self._recipe.lane_batch_size
        mine = slice(lanes.start * size, lanes.stop * size)
        shape = (self._recipe.global_batch_size, 3, *model_at(self._recipe, step).image_shape)
        images = torch.randint(256, shape, generator=torch.Generator().manual_seed(step), dtype=torch.uint8)[mine]
        ids = torch.arange(self._recipe.global_batch_size)[mine]
        batch = Batch(step, step, ids, images, 0.0, np.zeros((len(ids), 5), np.int32))
        shared = self._step.gradients(batch, self._recipe.learning_rate, instruction="", uploading=False)
        assert bool(shared.fault) == bool(poison)
        assert not shared.verdicts
        self._step.discard() if poison else self._step.update(step + 1)
        self.digests.append(self._step.digest())
        self.norms.append(self._step.gradient_norm)
        return shared.loss


def train_step(engine: Any, recipe: Recipe, step: int, poison: str = "") -> float:
    """One step on a global batch that depends on the step alone, weighted as jobs.step.training_step does."""
    engine.poison[0] = math.nan if poison == "gradient" and RANK == WORLD_SIZE - 1 else 1.0
    batch, sizes = recipe.global_batch_size, rank_sizes(recipe.global_batch_size)
    model = model_at(recipe, step)
    images = torch.randn(batch, 3, *model.image_shape, generator=torch.Generator().manual_seed(step))
    noise = mask_noise(recipe.seed, step, torch.arange(batch), model.mask_patches, "cpu")
    parts = micro_batches(sizes[RANK], max(sizes), recipe.micro_batch_size)
    first, total = sum(sizes[:RANK]), torch.zeros(1)
    set_learning_rate(engine, recipe.learning_rate)
    for part in parts:
        chosen = slice(first, first + part)
        loss = engine(images[chosen], noise=noise[chosen]).loss
        if poison == "loss" and RANK == WORLD_SIZE - 1:
            loss = loss * math.nan
        engine.backward(loss * (part * WORLD_SIZE * len(parts) / batch))
        total += loss.detach() * part / batch
        first += part
        if first < sum(sizes[: RANK + 1]):
            engine.step()
    broken = (~has_finite_gradients(engine)).float().view(1)
    dist.all_reduce(total)
    dist.all_reduce(broken)
    assert math.isnan(total.item()) == (poison == "loss")
    assert (broken.item() > 0) == bool(poison)
    discard_step(engine) if poison else engine.step()
    return total.item()


class _Scaled(torch.autograd.Function):
    """Its input; the gradient is multiplied by what `factor` holds at that time."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: list[float]) -> torch.Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor[0], None


def run(case: dict[str, Any]) -> dict[str, Any]:
    recipe = Recipe.from_json(case["recipe"])
    model = build_model(recipe)
    groups = optimizer_groups(model, recipe)
    owned = owned_ranges(model, groups, stage=recipe.zero_stage, rank=RANK, world_size=WORLD_SIZE)
    CountingStorage.forget()
    state = None
    if case["resume"]:
        restored = restore_newest(
            RunDirectory(CountingStorage(), case["resume"]), owned, RankGroup(RANK, WORLD_SIZE),
            check=lambda commit: None, on_damage=lambda *_: None,
        )  # fmt: skip
        assert restored
        state = restored.state
        model.load_state_dict(state.weights, strict=True)
    largest = max(rank_sizes(recipe.global_batch_size))
    count = 1 if recipe.is_exact else len(micro_batches(largest, largest, recipe.micro_batch_size))
    engine = build_engine(model, recipe, micro_batches_per_step=count, world_size=WORLD_SIZE)
    if state:
        restore_optimizer(engine, state)
    engine.poison = poison = [1.0]
    last = engine.module.head if recipe.finetune else engine.module.decoder
    last.register_forward_hook(lambda module, given, result: _Scaled.apply(result, poison))
    step, losses = int(state.optimizer_step) if state else 0, []
    exact = ExactSteps(engine, recipe) if recipe.is_exact or recipe.finetune else None
    train = exact.train if exact else partial(train_step, engine, recipe)
    for action in case["steps"]:
        if action == "train":
            losses.append(train(step))
            step += 1
        elif action in ("loss", "gradient"):
            train(step, poison=action)
        else:
            engine.save_checkpoint(action, tag="deepspeed", save_latest=False)
            save_part(RankFile(engine, RANK).copied(), Path(action))
    engine.destroy()
    seen = {"digests": exact.digests, "norms": exact.norms} if exact else {}
    return {"losses": losses, "read_bytes": CountingStorage.read_bytes, **seen}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["MEETING_POINT"], rank=RANK, world_size=WORLD_SIZE)
    initialize_deepspeed("cpu")
    for line in sys.stdin:
        answer = f"done: {json.dumps(run(json.loads(line)))}\n"
        sys.stdout.write(answer)
        sys.stdout.flush()
    dist.destroy_process_group()
