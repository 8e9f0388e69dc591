"""The basis of the model's figures, at a small size."""

from __future__ import annotations

import bench_model
import model_traffic
import pytest
import torch
from torch import nn

from model import ConvMAEConfig

FIGURES = {("fp32", bench_model.DENSE): 3.0, ("fp32", bench_model.SPARSE): 1.5, ("bf16", bench_model.SPARSE): 0.5}


@pytest.mark.parametrize(
    ("goal", "line"),
    [
        (
            bench_model.Goal("fp32", bench_model.DENSE, bench_model.SPARSE, 1.9, at_least=True),
            "fp32 dense / fp32 sparse: 2.00  (goal >= 1.9: reached)",
        ),
        (
            bench_model.Goal("fp32", bench_model.DENSE, bench_model.SPARSE, 1.5, at_least=False),
            "fp32 dense / fp32 sparse: 2.00  (goal <= 1.5: NOT reached)",
        ),
        (
            bench_model.Goal("bf16", bench_model.DENSE, bench_model.SPARSE, 7.0, at_least=True, over_precision="fp32"),
            "fp32 dense / bf16 sparse: 6.00  (goal >= 7.0: NOT reached)",
        ),
        (bench_model.Goal("bf16", bench_model.DENSE, bench_model.SPARSE, 1.7, at_least=True), None),
    ],
)
def test_a_goal_compares_what_was_measured(goal: bench_model.Goal, line: str | None) -> None:
    assert goal.line(FIGURES) == line


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sides_compute_the_same_loss(precision: str) -> None:
    options = bench_model.parse(["--preset", "tiny", "--batch", "2"])

    losses = []
    for name in (bench_model.SPARSE, bench_model.DENSE):
        side = bench_model.Side(name, precision, options)
        with torch.no_grad(), side.precision:
            losses.append(side.model(side.images, noise=side.noises[0]).loss.item())

    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if precision == "fp32" else 1e-2)


def test_views_and_separate_passes_compute_the_same_gradients() -> None:
    options = bench_model.parse(["--preset", "tiny", "--batch", "8", "--only-views"])
    assert bench_model.sides_of(options) == [bench_model.IN_VIEWS, bench_model.IN_PASSES, bench_model.IN_TURNS]

    found = []
    for name in bench_model.OF_VIEWS:
        side = bench_model.Side(name, "fp32", options)
        assert len(side.images) == 2
        side.step()
        found.append(torch.cat([value.grad.flatten() for value in side.model.parameters() if value.grad is not None]))

    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-6)


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    calls: list[str] = []

    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self) -> None:
            calls.append(self.name)

        def clear(self) -> None:
            calls.append("clear")

    figures = bench_model.timed([Side("a"), Side("b")], rounds=2)  # type: ignore[list-item]

    assert calls == ["a", "clear", "b", "clear"] * 3
    assert len(figures) == 2


def test_the_peak_of_a_process_is_what_its_step_needs() -> None:
    arguments = ["--preset", "tiny", "--batch", "8"]

    sparse, dense = (
        bench_model.peak_in_own_process(name, "fp32", arguments) for name in (bench_model.SPARSE, bench_model.DENSE)
    )

    assert 10e6 < sparse < dense < 500e6


def test_bytes_are_those_of_arguments_and_results() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(30, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(x).relu()

    model, x = Model(), torch.zeros(20, 30)
    with torch.no_grad(), model_traffic.ByteCounter() as counter:
        model(x)

    assert counter.products == {"decoder": 4 * (20 * 30 + 30 * 40 + 40 + 20 * 40)}
    assert counter.others == {"rest": 4 * 2 * 20 * 40}


@pytest.mark.parametrize("embed_dim", [(16, 24, 32), (0, 0, 32)])
def test_both_directions_are_counted_for_the_part_that_made_them(embed_dim: tuple[int, int, int]) -> None:
    convolutions = embed_dim[0] > 0
    depth = (1, 1, 2) if convolutions else (0, 0, 2)
    config = ConvMAEConfig(image_size=64, embed_dim=embed_dim, depth=depth, fusion=convolutions)

    few, many = (model_traffic.count_bytes(config, images, False, torch.float32) for images in (2, 4))

    parts = {"stage1", "stage2", "stage3", "fusion", "decoder"} if convolutions else {"stage3", "decoder"}
    assert few.products.keys() == parts
    for part in parts:
        assert few.products[part] < many.products[part] < 2 * few.products[part]  # weights are read once
