"""Steps of one rank on one device, by what a run's ranks use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.checkpoint.deepspeed_internals import MOMENTS, adam_slots, owned_slices
from jobs.checkpoint.zero_state import ZeroState, restore_optimizer
from jobs.rank.gpu import compute_as
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.recipe.resolution import resolution_at
from jobs.recipe.schedule import order_of
from jobs.step.engine import build_model
from jobs.step.step_words import wait_for
from jobs.step.training_step import RankPlace, SharedStep, TrainingStep, build_rank_engine
from model.convmae import Output
from pipeline.load.batch import Batch
from pipeline.load.device_copy import DeviceCopy

SAMPLES = 1000


def recipe_for(device: torch.device, **changes: object) -> Recipe:
    """A small model, twelve grains of two images."""
    fields: dict[str, Any] = {
        "model.image_size": 32,
        "model.depth": [1, 1, 2],
        "model.decoder_depth": 1,
        "global_batch_size": 24,
        "lanes": 12,
        "max_workers": 12,
        "base_learning_rate": 0.05,
        "device": device.type,
        **changes,
    }
    return named_recipe("tiny").amended(fields)


class NoReading:
    """Stands for what a rank reads."""

    def write(self, words: np.ndarray[Any, Any], *_: object) -> None:
        assert not words.any()


class PoisonedStep(TrainingStep):
    """A step whose loss is NaN while it is told so."""

    is_poisoned = False

    def forward(self, batch: Batch, chosen: slice) -> Output:
        output = super().forward(batch, chosen)
        return output._replace(loss=output.loss * math.nan) if self.is_poisoned else output


class Rank:
    """A rank that is alone, from its first step or from a state."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        state: ZeroState | None = None,
        wait: Callable[[torch.device], None] = wait_for,
    ) -> None:
        compute_as(recipe)
        self.recipe, self.device = recipe, device
        self.order, self.place = order_of(recipe, SAMPLES), RankPlace(0, 1, device)
        model = build_model(recipe)
        if state:
            model.load_state_dict(state.weights, strict=True)
        self.engine = build_rank_engine(model.to(device), recipe, self.order, self.place)
        if state:
            restore_optimizer(self.engine, state)
        self.step = PoisonedStep(self.engine, recipe, self.place, self.order, reading=NoReading(), wait=wait)  # type: ignore[arg-type]
        self.done = int(state.optimizer_step) if state else 0

    def batch(self) -> Batch:
        """The global batch of the next step, an epoch of its own, which depends on the step alone."""
        copy = DeviceCopy(self.device)
        size = resolution_at(self.recipe.resolutions, self.done).model.image_shape
        shape = (self.recipe.global_batch_size, 3, *size)
        images, ids = copy.empty(shape, torch.uint8), copy.empty(shape[:1], torch.int64)
        images.random_(0, 256, generator=torch.Generator().manual_seed(self.done))
        ids[:] = torch.arange(len(ids)) + self.done * len(ids)
        crops = np.zeros((len(ids), 5), np.int32)
        return Batch(self.done, self.done, ids, copy.finish(copy.start(images)), 0.0, crops)

    def gradients(self, batch: Batch) -> SharedStep:
        return self.step.gradients(batch, self.recipe.learning_rate, instruction="", uploading=False)

    def train(self, steps: int = 1) -> list[float]:
        """Losses of some steps."""
        losses = []
        for _ in range(steps):
            shared = self.gradients(self.batch())
            assert not shared.fault
            self.done += 1
            self.step.update(self.done)
            losses.append(shared.loss)
        return losses

    def weights(self) -> dict[str, Tensor]:
        """Of the module, on the host; not of ZeRO 3."""
        return {name: value.detach().cpu().clone() for name, value in self.engine.module.state_dict().items()}

    def state(self) -> ZeroState:
        """What a checkpoint holds of it, on the host."""
        moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
        masters, owned, count = self.weights(), {}, 0.0
        for flat, pieces in owned_slices(self.engine):
            slots = adam_slots(self.engine, flat)
            count = float(slots["step"])
            for piece in pieces:
                place = slice(piece.offset, piece.offset + piece.length)
                owned[piece.name] = range(piece.start, piece.start + piece.length)
                masters[piece.name] = flat.data[place].cpu().clone().view(masters[piece.name].shape)
                for moment in MOMENTS:
                    moments[moment][piece.name] = slots[moment][place].cpu().clone()
        return ZeroState(masters, owned, moments, count)
