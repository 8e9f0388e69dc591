"""Order, batch arithmetic, learning rate and checkpoints: pure functions of the recipe, the step and the world size.

A global batch of B images is dealt to W ranks by lanes, so that rank r has n_r images; a rank passes them through the
model in k micro-batches. k is the same on every rank, since gradients are reduced together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jobs.recipe.recipe import Recipe
from pipeline.order.sample_order import Order


@dataclass(frozen=True)
class Schedule:
    """The steps of a run and the learning rate at each."""

    steps_per_epoch: int
    total_steps: int
    """Steps that the run makes: all epochs, or `max_steps` if that is fewer."""
    schedule_steps: int
    """Steps that warm-up and cosine span: all epochs, whatever `max_steps` is."""
    warmup_steps: float
    peak_learning_rate: float
    min_learning_rate: float = 0.0
    """At the end of the cosine."""

    @classmethod
    def of(cls, recipe: Recipe, steps_per_epoch: int) -> Schedule:
        """The schedule of `recipe` over a data set of `steps_per_epoch` global batches per epoch."""
        schedule_steps = recipe.epochs * steps_per_epoch
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=min(schedule_steps, recipe.max_steps or schedule_steps),
            schedule_steps=schedule_steps,
            warmup_steps=recipe.warmup_epochs * steps_per_epoch,
            peak_learning_rate=recipe.learning_rate,
            min_learning_rate=recipe.finetune.min_learning_rate if recipe.finetune else 0.0,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0): linear warm-up from 0, then a half-cosine to the least.

        Source: arXiv:2205.03892, section 4.1; per step instead of per epoch, as in the released code.
        """
        if step < self.warmup_steps:
            return self.peak_learning_rate * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.schedule_steps - self.warmup_steps)
        falling = (self.peak_learning_rate - self.min_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_learning_rate + falling

    def is_milestone(self, step: int, milestone_epochs: tuple[int, ...]) -> bool:
        """Whether `step` finished steps end one of the epochs whose checkpoint is kept permanently."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        return rest == 0 and epoch in milestone_epochs

    def is_probe_epoch(self, step: int, recipe: Recipe) -> bool:
        """Whether `step` finished steps end one of every `probe_epochs`."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        by_epochs = epoch > 0 and recipe.probe_epochs > 0 and epoch % recipe.probe_epochs == 0
        return recipe.is_probed and rest == 0 and by_epochs

    def ends_in_validation(self, step: int, recipe: Recipe) -> bool:
        """Whether the accuracy of a fine-tuning is measured after `step` finished steps: by epochs, and at the end."""
        if not (recipe.finetune and recipe.finetune.has_validation):
            return False
        epoch, rest = divmod(step, self.steps_per_epoch)
        by_epochs = rest == 0 and recipe.finetune.validate_epochs > 0 and epoch % recipe.finetune.validate_epochs == 0
        return by_epochs or step == self.total_steps

    def ends_in_a_checkpoint(self, step: int, recipe: Recipe) -> bool:
        """Whether the ranks save after `step` finished steps unasked: by steps, milestones, probes and the end."""
        by_steps = recipe.checkpoint_interval == "steps"  # otherwise the monitor asks for it
        return (
            (by_steps and step % recipe.checkpoint_every_steps == 0)
            or step == self.total_steps
            or self.is_milestone(step, recipe.milestone_epochs)
            or self.is_probe_epoch(step, recipe)
        )


def order_of(recipe: Recipe, samples: int) -> Order:
    """The order in which `recipe` reads a data set of `samples` samples."""
    return Order(
        samples,
        global_batch_size=recipe.global_batch_size,
        lanes=recipe.lanes,
        seed=recipe.seed,
        block_samples=recipe.block_samples,
        window_blocks=recipe.window_blocks,
        lanes_together=recipe.lanes_together,
    )


def micro_batches(rank_samples: int, largest_rank_samples: int, micro_batch_size: int) -> list[int]:
    """Sizes of the micro-batches of a rank that has `rank_samples` images of the global batch.

    Their number is what the rank with the most images needs; sizes differ by at most one, none exceeds
    `micro_batch_size`. A size can be 0 on a rank that has fewer images than there are micro-batches.
    """
    count = math.ceil(largest_rank_samples / micro_batch_size)
    quotient, rest = divmod(rank_samples, count)
    return [quotient + 1] * rest + [quotient] * (count - rest)
