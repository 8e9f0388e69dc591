"""One optimizer step on one rank: gradients of the mean over the global batch, and what all ranks know of it.

Knows neither Ray nor a store: an engine and batches come in, and what all ranks agree on comes out. The gradient of a
step is the mean over the global batch, whatever the world size: to the bit where it is the sum of grains
(jobs.step.exact_gradients), else within rounding, as DeepSpeed adds up micro-batches.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.metrics.rank_figures import FigureTable
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import micro_batches
from jobs.step.compute_probe import ComputeProbe
from jobs.step.engine import (
    build_engine,
    discard_step,
    forget_compiled,
    has_finite_gradients,
    set_learning_rate,
)
from jobs.step.exact_gradients import ExactGradients, Forward, OnMask, digest_of, digest_words, grains_of_ranks
from jobs.step.instruction import INSTRUCTIONS, Instruction
from jobs.step.non_finite import FAULT_WORDS, NonFiniteLossError, fault_of, write_faults
from jobs.step.objective import Objective, Reconstruction
from jobs.step.step_reading import RankReading, StepReading, from_words, word_count
from jobs.step.step_verification import StepVerifier, Verdict
from jobs.step.step_words import INTEGER_WORDS, StepWords, integer_of, wait_for, words_of
from model.convmae import Output
from pipeline.load.batch import Batch
from pipeline.order.sample_order import ConsumedDigest, Order

if TYPE_CHECKING:
    import deepspeed

_HOST_WORDS = 4 + INTEGER_WORDS
"""The instruction, whether a rank uploads or hands over, and a digest of what was consumed: its count and total."""


@dataclass(frozen=True)
class RankPlace:
    """The place of a worker in its group."""

    rank: int
    world_size: int
    device: torch.device


class SharedStep(NamedTuple):
    """What every rank knows of a step before its update; the same on all of them."""

    loss: float
    """Mean over the global batch."""
    fault: str
    """What is not finite on some rank; empty where all is."""
    instruction: Instruction
    """What to do after it."""
    uploading: bool
    """Whether some rank is uploading a checkpoint."""
    holding: bool
    """Whether some rank's part of a memory checkpoint is on its way."""
    samples: str
    """Digest of the samples that were used."""
    state: str
    """Digest of all weights and moments before the update, where it was asked for; else empty."""
    figures: tuple[StepReading, FigureTable] | None
    """Of all ranks, and by rank; rank 0 alone has them."""
    verdicts: Sequence[Verdict] = ()
    """Of ranks that computed other gradients than the others, where the step was verified."""


class Gradients(Protocol):
    """How the gradients of a step come about."""

    words: int
    """Numbers that the ranks add up."""
    loss_words: int
    """The first of them, of which the loss is made."""

    def compute(self, batch: Batch, forward: Forward, on_mask: OnMask, words: Tensor) -> None:
        """Compute this rank's part, and write (words,) float64, which are 0, on the device. Collective."""

    def read(self, words: Sequence[float]) -> tuple[float, bool]:
        """The mean loss over the global batch, and whether all gradients are finite, of the sums over all ranks."""

    def update(self) -> bool:
        """Update the weights; False if the norm of the gradients is not finite. Collective."""

    def discard(self) -> None:
        """Forget the gradients in place of an update. Collective."""

    @property
    def norm(self) -> float:
        """Of all gradients, before they were clipped."""


class ReducedGradients:
    """Gradients as DeepSpeed reduces them, of micro-batches of whatever sizes this world size gives.

    A micro-batch of n images is weighted n * W * k / B before DeepSpeed's own division by k micro-batches and averaging
    over W ranks.
    """

    words, loss_words = 2, 1

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        recipe: Recipe,
        place: RankPlace,
        sizes: Sequence[int],
        probe: ComputeProbe,
    ) -> None:
        """Name what is worked with.

        Args:
            engine: Of jobs.step.engine.
            recipe: Of the run.
            place: Of this rank.
            sizes: Of its micro-batches; as many on every rank.
            probe: Times what this rank computes by itself: forward passes, as DeepSpeed's backward passes communicate.
                With ZeRO 3 forward passes do, too, and nothing is timed.
        """
        self._engine, self._recipe, self._place, self._sizes = engine, recipe, place, sizes
        self._timed = probe.computing if recipe.zero_stage < 3 else contextlib.nullcontext

    def compute(self, batch: Batch, forward: Forward, on_mask: OnMask, words: Tensor) -> None:
        """Run every micro-batch."""
        recipe, place, first = self._recipe, self._place, 0
        for index, size in enumerate(self._sizes):
            # A rank without images for this micro-batch still takes part in the reduction, with weight 0.
            with self._timed():
                output = forward(batch, slice(first, first + size) if size else slice(0, 1))
            if size:
                on_mask(output.mask)
            weight = size * place.world_size * len(self._sizes) / recipe.global_batch_size
            self._engine.backward(output.loss * weight)
            words[0] += output.loss.detach() * size / recipe.global_batch_size
            first += size
            if index + 1 < len(self._sizes):
                self._engine.step()
        words[1] = ~has_finite_gradients(self._engine)

    def read(self, words: Sequence[float]) -> tuple[float, bool]:
        """The ranks' parts of the mean loss, and the number of ranks that found something not finite."""
        loss, not_finite = words
        return loss, not not_finite

    def update(self) -> bool:
        """Update the weights; False where DeepSpeed found the norm not finite."""
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def discard(self) -> None:
        """Forget the gradients."""
        discard_step(self._engine)

    @property
    def norm(self) -> float:
        """Of the last update."""
        return float(self._engine.get_global_grad_norm() or 0.0)


def rank_micro_batches(recipe: Recipe, order: Order, rank: int, world_size: int) -> list[int]:
    """Sizes of a rank's micro-batches where they are free; as many on every rank."""
    sizes = [order.rank_batch_size(each, world_size) for each in range(world_size)]
    return micro_batches(sizes[rank], max(sizes), recipe.micro_batch_size)


def build_rank_engine(model: nn.Module, recipe: Recipe, order: Order, place: RankPlace) -> deepspeed.DeepSpeedEngine:
    """The engine of one rank, for gradients in the recipe's way. Collective."""
    count = 1 if recipe.is_exact else len(rank_micro_batches(recipe, order, place.rank, place.world_size))
    return build_engine(model, recipe, micro_batches_per_step=count, world_size=place.world_size)


def gradients_of(
    engine: deepspeed.DeepSpeedEngine, recipe: Recipe, order: Order, place: RankPlace, probe: ComputeProbe
) -> ExactGradients | ReducedGradients:
    """Gradients in the recipe's way."""
    if not recipe.is_exact:
        sizes = rank_micro_batches(recipe, order, place.rank, place.world_size)
        return ReducedGradients(engine, recipe, place, sizes, probe)
    lanes = [order.rank_lanes(rank, place.world_size) for rank in range(place.world_size)]
    grains = grains_of_ranks(lanes, lane_batch_size=order.lane_batch_size, grain=recipe.grain)
    return ExactGradients(engine, recipe, grains, place.rank, probe)


class TrainingStep:
    """The engine of one rank, and its part of each global batch."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        recipe: Recipe,
        place: RankPlace,
        order: Order,
        *,
        reading: RankReading,
        objective: Objective | None = None,
        on_mask: OnMask = lambda _: None,
        wait: Callable[[torch.device], None] = wait_for,
    ) -> None:
        """Name what a step works with.

        Args:
            engine: Of jobs.step.engine.
            recipe: Of the run.
            place: Of this rank.
            order: Of the run's samples.
            reading: Adds what the rank read, and how it fared.
            objective: What the model is trained for; None: pretraining.
            on_mask: Is given the masks, in the order of images.
            wait: Returns when the device is done.
        """
        self.engine = engine
        self._recipe, self.place, self._reading, self._on_mask = recipe, place, reading, on_mask
        self._probe = ComputeProbe(place.device)
        self._gradients: Gradients = gradients_of(engine, recipe, order, place, self._probe)
        self._objective = objective or Reconstruction(recipe, place.device)
        self._verifier: StepVerifier | None = None
        if recipe.verify_steps_every:
            assert isinstance(self._gradients, ExactGradients)
            self._verifier = StepVerifier(self._gradients, recipe, place)
        of_verifier = self._verifier.words if self._verifier else 0
        sizes = (FAULT_WORDS, self._gradients.words, self._objective.words, INTEGER_WORDS, of_verifier)
        first, second, third, fourth, last = itertools.accumulate(sizes)
        self._of_faults, self._of_gradients = slice(first), slice(first, second)
        self._of_objective, self._of_state = slice(second, third), slice(third, fourth)
        self._of_verifier = slice(fourth, last)
        self._of_host = slice(last, None)
        self._shape: torch.Size | None = None
        """Of the images of the last step."""
        self._statistics: list[float] = []
        """Of the objective, over all ranks, for the update."""
        of_host = _HOST_WORDS + word_count(place.world_size)
        self._words = StepWords(last, of_host, place.device, wait=wait)
        # DeepSpeed's own call would hook into a backward pass that is none of its own.
        self._model = engine.module if recipe.is_exact else engine

    def compiles(self, batch: Batch) -> bool:
        """Whether the step of this batch compiles the model first, for images of its shape."""
        return self._recipe.compile and batch.images.shape != self._shape

    def gradients(
        self,
        batch: Batch,
        learning_rate: float,
        *,
        instruction: Instruction,
        uploading: bool = False,
        holding: bool = False,
        with_digest: bool = False,
    ) -> SharedStep:
        """Gradients of the mean loss over the global batch. Collective; waits for the device, once in a step.

        The monitor's instruction travels from rank 0 with the loss, so that all ranks follow it after the same step; so
        does whether a rank is still saving, and what each rank read.

        Args:
            batch: This rank's part of the global batch.
            learning_rate: Of the update that follows.
            instruction: The monitor's, on rank 0.
            uploading: Whether this rank uploads a checkpoint.
            holding: Whether this rank's part of a memory checkpoint is on its way.
            with_digest: Whether to compute that of the state before the update.
        """
        if self.compiles(batch) and self._shape:
            forget_compiled()
        self._shape = batch.images.shape
        set_learning_rate(self.engine, learning_rate)
        self._write_words_of_host(batch, instruction, uploading=uploading, holding=holding)
        words = self._words.send()
        of_gradients = words[self._of_gradients]
        verifier = self._verifier if self._verifier and self._verifier.is_due(batch.step) else None
        if verifier:
            verifier.begin(batch, self.forward)
        self._gradients.compute(batch, self.forward, self._on_mask, of_gradients)
        if verifier:
            verifier.write(words[self._of_verifier])
        self._objective.write(words[self._of_objective])
        write_faults(words[self._of_faults], of_gradients[: self._gradients.loss_words], self.place.rank)
        with_digest = with_digest and self._recipe.is_exact
        if with_digest:
            words[self._of_state] = digest_words(self.engine)
        summed = self._words.add_up()
        self._probe.stepped(len(batch.images))
        shared = self._shared(summed, with_digest=with_digest)
        return shared._replace(verdicts=verifier.read(summed[self._of_verifier])) if verifier else shared

    def _write_words_of_host(self, batch: Batch, instruction: Instruction, *, uploading: bool, holding: bool) -> None:
        words, consumed = self._words.of_host(), ConsumedDigest.of(batch.sample_ids.numpy())
        told = INSTRUCTIONS.index(instruction) if self.place.rank == 0 else 0
        words[:_HOST_WORDS] = [told, uploading, holding, consumed.count, *words_of(consumed.total)]
        self._reading.write(words[_HOST_WORDS:], batch, self._probe)

    def _shared(self, summed: NDArray[np.float64], *, with_digest: bool) -> SharedStep:
        loss, are_finite = self._gradients.read(summed[self._of_gradients].tolist())
        self._statistics = summed[self._of_objective].tolist()
        told, uploads, holds, count, *total = summed[self._of_host][:_HOST_WORDS].tolist()
        return SharedStep(
            loss=loss,
            fault=fault_of(summed[self._of_faults].tolist(), gradients_are_finite=are_finite),
            instruction=INSTRUCTIONS[int(told)],
            uploading=uploads > 0,
            holding=holds > 0,
            samples=str(ConsumedDigest(int(count), integer_of(total))),
            state=digest_of(summed[self._of_state].tolist()) if with_digest else "",
            figures=from_words(summed[self._of_host][_HOST_WORDS:].copy()) if self.place.rank == 0 else None,
        )

    def update(self, step: int) -> None:
        """Update the weights; every rank must call it for the same step.

        Raises:
            NonFiniteLossError: Every gradient is finite, and the sum of their squares is not.
        """
        if not self._gradients.update():
            raise NonFiniteLossError(f"the gradient's norm is not finite at step {step}; no update was made")
        self._objective.update(self._statistics)

    def discard(self) -> None:
        """Forget the gradients in place of an update; every rank must call it for the same step."""
        self._gradients.discard()

    def digest(self) -> str:
        """Of all weights and moments; empty where they depend on the world size. Collective, and waits."""
        if not self._recipe.is_exact:
            return ""
        words = digest_words(self.engine)
        dist.all_reduce(words)
        return digest_of(words.tolist())

    @property
    def gradient_norm(self) -> float:
        """Of the last update, before clipping."""
        return self._gradients.norm

    @property
    def learning_rate(self) -> float:
        """The one that the optimizer has now; of layers with a factor the highest."""
        return float(max(group["lr"] for group in self.engine.optimizer.param_groups))

    def forward(self, batch: Batch, chosen: slice) -> Output:
        """The model's output for one micro-batch, with its loss.

        Args:
            batch: This rank's part of the global batch.
            chosen: The images of the micro-batch.
        """
        return self._objective.output(self._model, batch, chosen)
