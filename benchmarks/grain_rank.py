"""One rank of bench_grains: the same steps by exact gradients and as DeepSpeed reduces them, in turn.

Configured by the environment (RANK, WORLD_SIZE, BENCH_SETTINGS); rank 0 prints one JSON object: for each side the CPU
seconds of this rank's process, and the seconds that passed, of each round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import order_of
from jobs.step.engine import build_model, initialize_deepspeed
from jobs.step.training_step import RankPlace, TrainingStep, build_rank_engine
from pipeline.load.batch import Batch

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SIDES = ("bits", "rounding")


class NoReading:
    """Reads nothing."""

    def write(self, words: torch.Tensor, *_: object) -> None:
        """Leave the words as they are."""


class Side:
    """An engine and its steps."""

    def __init__(self, recipe: Recipe) -> None:
        place = RankPlace(RANK, WORLD_SIZE, torch.device("cpu"))
        order = order_of(recipe, 100 * recipe.global_batch_size)
        engine = build_rank_engine(build_model(recipe), recipe, order, place)
        self._step = TrainingStep(engine, recipe, place, order, reading=NoReading())  # type: ignore[arg-type]
        self._recipe, self._done = recipe, 0
        count = order.rank_batch_size(RANK, WORLD_SIZE)
        images = torch.randint(256, (count, 3, *recipe.model.image_shape), dtype=torch.uint8)
        self._batch = Batch(0, 0, torch.arange(count), images, 0.0, np.zeros((count, 5), np.int32))

    def train(self) -> tuple[float, float]:
        """One step: CPU seconds of this process, and seconds."""
        cpu, began = time.process_time(), time.perf_counter()
        shared = self._step.gradients(self._batch, self._recipe.learning_rate, instruction="", uploading=False)
        assert not shared.fault
        self._done += 1
        self._step.update(self._done)
        return time.process_time() - cpu, time.perf_counter() - began


def main() -> None:
    """Train by both sides in turn, and print what each step took."""
    settings: dict[str, Any] = json.loads(os.environ["BENCH_SETTINGS"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=settings["meeting_point"], rank=RANK, world_size=WORLD_SIZE)
    initialize_deepspeed("cpu")
    sides = {side: Side(Recipe.from_json({**settings["recipe"], "reproducible": side})) for side in SIDES}
    for side in sides.values():
        side.train()  # the first step makes room
    rounds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(settings["rounds"]):
        for side in SIDES if number % 2 else reversed(SIDES):
            dist.barrier()
            rounds[side].append(sides[side].train())
    if RANK == 0:
        sys.stdout.write(json.dumps(rounds) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
