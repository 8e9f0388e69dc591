"""Training steps on the device, by real engines of every ZeRO stage."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steps import Rank, recipe_for
from torch import Tensor

from jobs.checkpoint.deepspeed_internals import adam_slots, owned_slices
from jobs.step.engine import ADAM_BETAS, build_model, parameter_groups
from jobs.step.exact_gradients import norm_of, norm_words
from jobs.step.gradient_tree import PartialSums, add_tree
from jobs.step.step_words import wait_for
from model.noise import mask_noise
from model.pixels import normalise

pytestmark = pytest.mark.usefixtures("group")

BLOCKING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def plain_losses(rank: Rank, steps: int) -> list[float]:
    """Of the same steps by PyTorch alone, each on the whole batch at once."""
    recipe, device = rank.recipe, rank.device
    model = build_model(recipe).to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=ADAM_BETAS
    )
    losses = []
    for rank.done in range(steps):
        batch = rank.batch()
        noise = mask_noise(recipe.seed, batch.epoch, batch.sample_ids.to(device), recipe.model.mask_patches, device)
        loss = model(normalise(batch.images, recipe.statistics), noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    rank.done = 0
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_as_plain_pytorch_does(device: torch.device, stage: int) -> None:
    rank = Rank(recipe_for(device, zero_stage=stage, clip_grad_norm=0.0), device)

    expected = plain_losses(rank, 4)

    assert expected[3] < expected[0]
    assert rank.train(4) == pytest.approx(expected, rel=2e-3)


GROWING = {
    "model.image_size": 64,
    "model.position": "learned",
    "epochs": 4,
    "warmup_epochs": 1,
    "resolution_schedule": [[0, 32], [0.5, 64]],
}


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16"}, {"zero_stage": 2, "clip_grad_norm": 0.05}, {"model.views": 4}, GROWING]
)
def test_a_saved_and_resumed_run_has_the_bits_of_an_uninterrupted_one(
    device: torch.device, changes: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_for(device, **changes)
    calm = Rank(recipe, device)
    calm.train(4)
    first = Rank(recipe, device)
    first.train(2)
    torch.save(first.state(), tmp_path / "state")

    resumed = Rank(recipe, device, torch.load(tmp_path / "state", weights_only=False))
    assert resumed.step.digest() == first.step.digest()
    resumed.train(2)

    assert resumed.step.digest() == calm.step.digest()


def test_recomputed_activations_change_no_bit(device: torch.device) -> None:
    recipes = (recipe_for(device), recipe_for(device, recompute=["stage3", "decoder"]))
    plain, recomputed = (Rank(recipe, device) for recipe in recipes)

    assert plain.train(2) == recomputed.train(2)
    assert plain.step.digest() == recomputed.step.digest()


def grain_gradients(rank: Rank, grains: range) -> dict[int, Tensor]:
    """Gradients of some grains, in the given order."""
    batch, found, size = rank.batch(), {}, rank.recipe.grain
    parameters = [value for value in rank.engine.module.parameters() if value.requires_grad]
    for grain in grains:
        loss = rank.step.forward(batch, slice(grain * size, (grain + 1) * size)).loss
        found[grain] = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_grains_in_any_order_dealt_to_any_ranks_give_the_same_gradient_and_norm(
    device: torch.device, precision: str
) -> None:
    rank = Rank(recipe_for(device, precision=precision), device)
    count = rank.order.global_batch_size // rank.recipe.grain
    gradients, backwards = grain_gradients(rank, range(count)), grain_gradients(rank, range(count)[::-1])
    assert all(torch.equal(gradients[grain], backwards[grain]) for grain in range(count))
    sums, norms = [], set()

    for world_size in (1, 2, 3, 5):
        nodes: dict[Any, Tensor] = {}
        for each in range(world_size):
            partial = PartialSums(len(gradients[0]), device)
            for grain in range(each * count // world_size, (each + 1) * count // world_size):
                partial.add(grain, lambda vector, add, grain=grain: _write(vector, gradients[grain], add))  # type: ignore[misc]
            nodes.update(partial.vectors())
        whole = add_tree(count, nodes)
        parts = whole.tensor_split(world_size)
        words = sum(
            norm_words([part], len(whole), rank=each, all_reduce=_as_all(whole)) for each, part in enumerate(parts)
        )
        assert isinstance(words, Tensor)
        sums.append(whole)
        norms.add(norm_of(words.tolist(), len(whole)))

    assert all(torch.equal(sums[0], each) for each in sums)
    (norm,) = norms
    assert norm == pytest.approx(float(sums[0].double().norm()), rel=1e-6)


def _write(vector: Tensor, gradient: Tensor, add: bool) -> None:
    vector.copy_(vector + gradient if add else gradient)


def _as_all(whole: Tensor) -> Any:
    """Stands for the all-reduce that finds the largest element."""
    return lambda largest, op: largest.fill_(whole.abs().amax().double())


def test_a_loss_that_is_nan_is_named_and_its_step_discarded_without_a_trace(device: torch.device) -> None:
    rank = Rank(recipe_for(device), device)
    rank.train()
    before = rank.step.digest()
    rank.step.is_poisoned = True

    shared = rank.gradients(rank.batch())
    rank.step.discard()

    assert shared.fault == "the loss of rank 0"
    assert rank.step.digest() == before
    rank.step.is_poisoned = False
    calm = Rank(recipe_for(device), device)
    calm.train(2)
    rank.train()
    assert rank.step.digest() == calm.step.digest()


@contextmanager
def blocking_calls(device: str) -> Iterator[Counter[str]]:
    """Counts what makes the host wait for a device, by name."""
    seen: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in BLOCKING:
            whole = getattr(Tensor, name)

            def counted(self: Tensor, *given: Any, name: str = name, whole: Any = whole, **options: Any) -> Any:
                if self.device.type == device:
                    seen[name] += 1
                return whole(self, *given, **options)

            patch.setattr(Tensor, name, counted)
        yield seen


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_waits_for_the_device_once(device: torch.device, stage: int) -> None:
    waits: list[torch.device] = []

    def wait(where: torch.device) -> None:
        waits.append(where)
        wait_for(where)

    rank = Rank(recipe_for(device, zero_stage=stage), device, wait=wait)
    rank.train(2)
    waits.clear()
    batches = [rank.batch() for _ in range(2)]

    with blocking_calls(device.type) as seen, warnings.catch_warnings(record=True) as waited:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        for batch in batches:
            rank.gradients(batch)
            rank.done += 1
            rank.step.update(rank.done)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")

    assert waits == [device] * 2
    assert not [warning for warning in waited if "synchroniz" in str(warning.message)]
    of_host = {"numpy": 3 * len(batches)} if device.type == "cpu" else {}
    assert dict(seen) == of_host, "sample ids, and words on their way there and back, are the host's own"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("reproducible", ["bits", "rounding"])
def test_a_step_is_timed_where_its_rank_computes_alone(device: torch.device, stage: int, reproducible: str) -> None:
    rank = Rank(recipe_for(device, zero_stage=stage, reproducible=reproducible), device)
    seen: list[Mapping[str, float]] = []
    rank.step._reading = SimpleNamespace(write=lambda words, batch, probe: seen.append(probe.poll().metrics))  # type: ignore[assignment]
    rank.train(2)
    began = time.perf_counter()
    rank.train()
    seconds = time.perf_counter() - began
    rank.train()

    first, _, _, last = seen
    assert not first, "nothing was computed before"
    assert last["images"] == rank.recipe.global_batch_size
    if stage == 3:
        assert last["compute_seconds"] == 0, "forward passes gather weights"
    else:
        assert 0.02 * seconds < last["compute_seconds"] < seconds


@pytest.mark.parametrize("kind", ["trained", "frozen", "moment"])
def test_one_bit_of_any_value_changes_the_digest(device: torch.device, kind: str) -> None:
    rank = Rank(recipe_for(device), device)
    rank.train()
    (flat, _), *_ = owned_slices(rank.engine)
    frozen = next(value for value in rank.engine.module.parameters() if not value.requires_grad)
    values = {"trained": flat.data, "frozen": frozen.data.view(-1), "moment": adam_slots(rank.engine, flat)["exp_avg"]}
    before = rank.step.digest()

    values[kind][7:8].view(torch.int32).bitwise_xor_(1)

    assert rank.step.digest() != before
