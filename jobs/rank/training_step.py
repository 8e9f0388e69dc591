"""One optimizer step on one rank: gradients of the mean over the global batch, and what all ranks know of it.

Knows neither Ray nor a store: an engine and batches come in, and what all ranks agree on comes out. The gradient of a
step is the exact mean over the global batch, whatever the world size: a micro-batch of n images is weighted
n * W * k / B before DeepSpeed's own division by k micro-batches and averaging over W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.metrics.rank_figures import FigureTable
from jobs.rank.engine import discard_step, has_finite_gradients, set_learning_rate
from jobs.rank.instruction import INSTRUCTIONS, Instruction
from jobs.rank.non_finite import FAULT_WORDS, NonFiniteLossError, fault_of, fault_words
from jobs.rank.step_reading import RankReading, StepReading, from_words, word_count
from jobs.recipe.recipe import Recipe
from model.convmae import Output
from model.noise import mask_noise
from model.pixels import normalise
from pipeline.load.batch import Batch
from pipeline.order.sample_order import ConsumedDigest

if TYPE_CHECKING:
    import deepspeed


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
    samples: str
    """Digest of the samples that were used."""
    figures: tuple[StepReading, FigureTable] | None
    """Of all ranks, and by rank; rank 0 alone has them."""


class TrainingStep:
    """The engine of one rank, and its micro-batches of each global batch."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        recipe: Recipe,
        place: RankPlace,
        sizes: Sequence[int],
        *,
        reading: RankReading,
        on_mask: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Name what a step works with.

        Args:
            engine: Of jobs.rank.engine.
            recipe: Of the run.
            place: Of this rank.
            sizes: Of its micro-batches; as many on every rank.
            reading: Adds what the rank read, and how it fared.
            on_mask: Is given the mask of each micro-batch.
        """
        self.engine = engine
        self._recipe, self.place, self._sizes, self._reading, self._on_mask = recipe, place, sizes, reading, on_mask

    def gradients(self, batch: Batch, learning_rate: float, *, instruction: Instruction, uploading: bool) -> SharedStep:
        """Gradients of the mean loss over the global batch. Collective.

        The monitor's instruction travels from rank 0 with the loss, so that all ranks follow it after the same step; so
        does whether a rank is uploading, and what each rank read.

        Args:
            batch: This rank's part of the global batch.
            learning_rate: Of the update that follows.
            instruction: The monitor's, on rank 0.
            uploading: Whether this rank uploads a checkpoint.
        """
        set_learning_rate(self.engine, learning_rate)
        place, words_from = self.place, 3 + FAULT_WORDS
        total = torch.zeros(words_from + word_count(place.world_size), device=place.device, dtype=torch.float64)
        total[0] = self._backward(batch)
        total[1] = float(INSTRUCTIONS.index(instruction) if place.rank == 0 else 0)
        total[2] = float(uploading)
        faults = fault_words(
            place.rank,
            loss_is_finite=bool(total[0].isfinite()),
            gradients_are_finite=has_finite_gradients(self.engine),
        )
        total[3:words_from] = torch.tensor(faults, device=place.device, dtype=torch.float64)
        self._reading.write(total[words_from:], batch)
        consumed = torch.tensor(ConsumedDigest.of(batch.sample_ids.numpy()).words(), device=place.device)
        dist.all_reduce(total)
        dist.all_reduce(consumed)
        loss, instructed, uploads, *faults = total[:words_from].tolist()
        digest = str(ConsumedDigest.from_words(consumed.tolist()))
        figures = from_words(total[words_from:].cpu().numpy()) if place.rank == 0 else None
        return SharedStep(loss, fault_of(faults), INSTRUCTIONS[int(instructed)], uploads > 0, digest, figures)

    def update(self, step: int) -> None:
        """Update the weights; every rank must call it for the same step.

        Raises:
            NonFiniteLossError: Every gradient is finite, and the sum of their squares is not.
        """
        self.engine.step()
        if not self.engine.was_step_applied():
            raise NonFiniteLossError(f"the gradient's norm is not finite at step {step}; no update was made")

    def discard(self) -> None:
        """Forget the gradients in place of an update; every rank must call it for the same step."""
        discard_step(self.engine)

    @property
    def gradient_norm(self) -> float:
        """Of the last update, before clipping."""
        return float(self.engine.get_global_grad_norm() or 0.0)

    @property
    def learning_rate(self) -> float:
        """The one that the optimizer has now."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def _backward(self, batch: Batch) -> Tensor:
        """Run every micro-batch; returns this rank's part of the mean loss."""
        recipe, place = self._recipe, self.place
        loss_sum, first = torch.zeros((), device=place.device, dtype=torch.float64), 0
        for index, size in enumerate(self._sizes):
            # A rank without images for this micro-batch still takes part in the reduction, with weight 0.
            output = self.forward(batch, slice(first, first + size) if size else slice(0, 1))
            if self._on_mask and size:
                self._on_mask(output.mask)
            weight = size * place.world_size * len(self._sizes) / recipe.global_batch_size
            self.engine.backward(output.loss * weight)
            loss_sum += output.loss.detach() * size / recipe.global_batch_size
            first += size
            if index + 1 < len(self._sizes):
                self.engine.step()
        return loss_sum

    def forward(self, batch: Batch, chosen: slice) -> Output:
        """The model's output for one micro-batch, with its loss.

        Args:
            batch: This rank's part of the global batch.
            chosen: The images of the micro-batch.
        """
        device = self.place.device
        sample_ids = batch.sample_ids[chosen].to(device, non_blocking=True)
        noise = mask_noise(self._recipe.seed, batch.epoch, sample_ids, self._recipe.model.mask_patches, device)
        output: Output = self.engine(normalise(batch.images[chosen]), noise=noise)
        return output
