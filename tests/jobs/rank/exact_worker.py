"""One rank that trains a tiny ConvMAE through jobs.rank.exact_gradients, as test_exact_gradients tells it.

Reads one JSON case a line from standard input: {recipe, steps, poison}; answers with `done: {losses, norms, digests}`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from jobs.rank.engine import build_engine, build_model, initialize_deepspeed, set_learning_rate
from jobs.rank.exact_gradients import ExactGradients, exact_norm, grains_of_ranks, state_digest
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import order_of
from model.noise import mask_noise

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
GRAIN = 2


def run(case: dict[str, Any]) -> dict[str, Any]:
    recipe = Recipe.from_json(case["recipe"])
    engine = build_engine(build_model(recipe), recipe, micro_batches_per_step=1, world_size=WORLD_SIZE)
    order = order_of(recipe, 1000)
    lanes = [order.rank_lanes(rank, WORLD_SIZE) for rank in range(WORLD_SIZE)]
    by_rank = grains_of_ranks(lanes, recipe.lane_batch_size // GRAIN)
    gradients = ExactGradients(engine, by_rank, RANK)
    batch = recipe.global_batch_size
    losses, norms, digests = [], [], []
    for step in range(case["steps"]):
        images = torch.randn(batch, 3, *recipe.model.image_shape, generator=torch.Generator().manual_seed(step))
        noise = mask_noise(recipe.seed, step, torch.arange(batch), recipe.model.mask_patches, "cpu")
        by_grain = torch.zeros(by_rank[-1].stop, dtype=torch.float64)
        for grain in by_rank[RANK]:
            chosen = slice(grain * GRAIN, (grain + 1) * GRAIN)
            share = engine.module(images[chosen], noise=noise[chosen]).loss * (GRAIN / batch)
            gradients.add(grain, share)
            by_grain[grain] = share.detach().double()
        gradients.reduce()
        norm = exact_norm(gradients.partitions)
        dist.all_reduce(by_grain)
        losses.append(sum(by_grain.tolist()))
        norms.append(norm)
        set_learning_rate(engine, recipe.learning_rate)
        gradients.hand_over(min(1.0, recipe.clip_grad_norm / (norm + 1e-6)) if recipe.clip_grad_norm else 1.0)
        engine.step()
        assert engine.was_step_applied()
        digests.append(state_digest(engine))
    engine.destroy()
    assert all(math.isfinite(loss) for loss in losses)
    return {"losses": losses, "norms": norms, "digests": digests}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["MEETING_POINT"], rank=RANK, world_size=WORLD_SIZE)
    initialize_deepspeed("cpu")
    for line in sys.stdin:
        sys.stdout.write(f"done: {json.dumps(run(json.loads(line)))}\n")
        sys.stdout.flush()
    dist.destroy_process_group()
