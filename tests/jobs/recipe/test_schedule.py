from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.schedule import Schedule, micro_batches, order_of
from jobs.step.compute_probe import ComputeProbe
from jobs.step.training_step import RankPlace, ReducedGradients
from model.convmae import Output

RECIPE = named_recipe("tiny").amended({"epochs": 20, "warmup_epochs": 2.5})
SCHEDULE = Schedule.of(RECIPE, steps_per_epoch=8)


def test_steps_span_all_epochs() -> None:
    assert (SCHEDULE.total_steps, SCHEDULE.schedule_steps, SCHEDULE.warmup_steps) == (160, 160, 20)


@pytest.mark.parametrize("step", range(21))
def test_warm_up_is_linear_from_zero_to_the_peak(step: int) -> None:
    assert SCHEDULE.learning_rate(step) == pytest.approx(RECIPE.learning_rate * step / 20, abs=0)


@given(st.integers(20, 160))
def test_after_warm_up_it_is_a_half_cosine_to_zero(step: int) -> None:
    angle = math.pi * (step - 20) / 140

    assert SCHEDULE.learning_rate(step) == pytest.approx(RECIPE.learning_rate * math.cos(angle / 2) ** 2, abs=1e-12)


def test_the_learning_rate_ends_at_zero() -> None:
    assert SCHEDULE.learning_rate(160) == 0
    assert 0 < SCHEDULE.learning_rate(159) < 1e-3 * RECIPE.learning_rate


def test_without_warm_up_the_peak_comes_first() -> None:
    schedule = Schedule.of(RECIPE.amended({"warmup_epochs": 0}), steps_per_epoch=8)

    assert schedule.learning_rate(0) == RECIPE.learning_rate


@pytest.mark.parametrize("max_steps", [1, 7, 100, 160, 1000])
def test_max_steps_cuts_the_run_and_leaves_the_learning_rate(max_steps: int) -> None:
    cut = Schedule.of(RECIPE.amended({"max_steps": max_steps}), steps_per_epoch=8)

    assert cut.total_steps == min(max_steps, 160)
    assert [cut.learning_rate(step) for step in range(161)] == [SCHEDULE.learning_rate(step) for step in range(161)]


def test_milestones_are_whole_epochs_of_the_list() -> None:
    assert [step for step in range(161) if SCHEDULE.is_milestone(step, (2, 5, 99))] == [16, 40]


@pytest.mark.parametrize(("interval", "due"), [("steps", [10, 16, 20, 30]), ("seconds", [16]), ("auto", [16])])
def test_ranks_save_by_the_interval_of_steps_alone_and_always_at_milestones_and_the_end(
    interval: str, due: list[int]
) -> None:
    recipe = RECIPE.amended({"checkpoint_interval": interval, "checkpoint_every_steps": 10, "milestone_epochs": [2]})
    cut = Schedule.of(recipe.amended({"max_steps": 157}), steps_per_epoch=8)

    assert [step for step in range(1, 31) if cut.ends_in_a_checkpoint(step, recipe)] == due
    assert cut.ends_in_a_checkpoint(157, recipe)


batches = st.tuples(st.integers(1, 64), st.integers(1, 8), st.integers(1, 40)).flatmap(
    lambda numbers: st.tuples(
        st.just(numbers[0]),  # lanes
        st.just(numbers[1]),  # images of a lane
        st.just(numbers[2]),  # micro_batch_size
        st.integers(1, numbers[0]),  # world size
    )
)


def rank_sizes(lanes: int, lane_batch_size: int, world_size: int) -> list[int]:
    recipe = RECIPE.amended({"global_batch_size": lanes * lane_batch_size, "lanes": lanes, "max_workers": 1})
    order = order_of(recipe, samples=lanes * lane_batch_size * 2)
    return [len(order.rank_lanes(rank, world_size)) * lane_batch_size for rank in range(world_size)]


@given(batches)
def test_micro_batches_cover_the_global_batch_equally_often_on_all_ranks(batch: tuple[int, int, int, int]) -> None:
    lanes, lane_batch_size, micro_batch_size, world_size = batch
    sizes = rank_sizes(lanes, lane_batch_size, world_size)

    parts = [micro_batches(size, max(sizes), micro_batch_size) for size in sizes]

    assert [sum(part) for part in parts] == sizes
    assert sum(sizes) == lanes * lane_batch_size
    assert {len(part) for part in parts} == {math.ceil(max(sizes) / micro_batch_size)}
    for part in parts:
        assert max(part) - min(part) <= 1
        assert min(part) >= 0 and max(part) <= micro_batch_size


class FakeEngine:
    """What DeepSpeed does with the losses of one rank: divide by the micro-batches of a step, and accumulate."""

    def __init__(self, micro_batches_per_step: int) -> None:
        self._count = micro_batches_per_step
        self.optimizer = SimpleNamespace(averaged_gradients={}, param_groups=[])
        self.device = torch.device("cpu")

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss / self._count)

    def step(self) -> None:
        pass


def sample_losses(weights: Tensor, images: Tensor) -> Tensor:
    """(B,) losses that are not linear in the weights, so that a wrong mean cannot hide."""
    return torch.sin(images @ weights) ** 2


@pytest.mark.parametrize(
    ("lanes", "lane_batch_size", "micro_batch_size", "world_size"),
    [(12, 1, 12, 1), (12, 1, 2, 1), (12, 1, 5, 2), (12, 1, 2, 5), (3, 2, 1, 2), (7, 3, 4, 4), (5, 1, 2, 5)],
)
def test_the_weighted_gradient_is_the_exact_mean_over_the_global_batch(
    lanes: int, lane_batch_size: int, micro_batch_size: int, world_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = rank_sizes(lanes, lane_batch_size, world_size)
    images = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    mean = sample_losses(weights, images).mean()
    (expected,) = torch.autograd.grad(mean, weights)

    losses = []
    for rank, rank_images in enumerate(torch.split(images, sizes)):
        recipe = RECIPE.amended({"global_batch_size": sum(sizes), "lanes": lanes, "max_workers": 1})
        parts = micro_batches(sizes[rank], max(sizes), micro_batch_size)
        losses.append(
            backward_of_rank(recipe, RankPlace(rank, world_size, torch.device("cpu")), parts, rank_images, weights)
        )

    assert weights.grad is not None
    torch.testing.assert_close(weights.grad / world_size, expected, rtol=1e-12, atol=1e-14)
    assert sum(losses) == pytest.approx(mean.item(), rel=1e-12)


def backward_of_rank(recipe: Any, place: RankPlace, parts: list[int], images: Tensor, weights: Tensor) -> float:
    """The step's gradients on one rank, with its engine and model replaced; returns its part of the loss."""
    engine: Any = FakeEngine(len(parts))
    batch: Any = SimpleNamespace(images=images)

    def forward(batch: Any, chosen: slice) -> Output:
        return Output(sample_losses(weights, batch.images[chosen]).mean(), torch.empty(0))

    words = torch.zeros(ReducedGradients.words, dtype=torch.float64)
    probe = ComputeProbe(place.device)
    ReducedGradients(engine, recipe, place, parts, probe).compute(batch, forward, lambda _: None, words)
    return float(words[0])


def test_ranks_save_at_the_epochs_of_probes() -> None:
    recipe = RECIPE.amended({"checkpoint_every_steps": 1000, "milestone_epochs": [], "probe_epochs": 2})
    schedule = Schedule.of(recipe, steps_per_epoch=4)

    assert [step for step in range(1, 21) if schedule.ends_in_a_checkpoint(step, recipe)] == [8, 16]
    off = recipe.amended({"probes": False})
    assert not any(schedule.ends_in_a_checkpoint(step, off) for step in range(1, 21))
