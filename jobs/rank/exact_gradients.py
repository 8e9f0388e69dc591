"""Gradients, their norm and the digest of what they made of the weights, to the bit the same at any world size.

With ZeRO 1 and 2 every rank holds all weights, so that gradients of one grain after the other can be taken by
`torch.autograd.grad`, past DeepSpeed's hooks: these would add them up in an order that depends on the world size. What
is summed by `jobs.rank.gradient_tree` is handed to DeepSpeed's optimizer as its partition of the averaged gradients.
Sums over elements, of squares and of bits, are sums of integers, whose order does not matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.checkpoint.deepspeed_internals import adam_slots, give_gradients, owned_slices, parameter_groups_in_order
from jobs.checkpoint.zero_files import MOMENTS
from jobs.rank.gradient_tree import Exchange, PartialSums
from jobs.recipe.recipe import Recipe
from pipeline.load.batch import Batch

if TYPE_CHECKING:
    import deepspeed

    from jobs.rank.training_step import Forward, OnMask

_CHUNK = 1 << 20
"""Elements that are looked at together: in 64 bits they are twice as large."""
_SPREAD, _MIX = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)
"""Odd constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed integers."""


def grains_of_ranks(lanes_by_rank: Sequence[range], *, lane_batch_size: int, grain: int) -> list[range]:
    """The grains of each rank: those that its lanes make up, one after the other in the global batch.

    Args:
        lanes_by_rank: In order.
        lane_batch_size: Images of one lane in a global batch.
        grain: Images of a grain.
    """
    return [range(*(lane * lane_batch_size // grain for lane in (lanes.start, lanes.stop))) for lanes in lanes_by_rank]


class ExactGradients:
    """The gradient as the sum over the grains of the global batch, of which each rank computes some.

    Attributes are those of `jobs.rank.training_step.Gradients`.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, recipe: Recipe, grains_by_rank: Sequence[range], rank: int
    ) -> None:
        """Lay out the vectors; every rank alike.

        Args:
            engine: Of ZeRO 1 or 2, which neither clips nor accumulates.
            recipe: Says how large grains are, and at which norm gradients are clipped.
            grains_by_rank: From `grains_of_ranks`.
            rank: This one.
        """
        self._engine, self._recipe, self._grains = engine, recipe, grains_by_rank[rank]
        self._parameters: list[Tensor] = []
        self._firsts: list[int] = []
        numels, position = [], 0
        for numel, group in parameter_groups_in_order(engine):
            first = position
            for parameter in group:
                self._parameters.append(parameter)
                self._firsts.append(first)
                first += parameter.numel()
            numels.append(numel)
            position += numel * len(grains_by_rank)
        self._sums = PartialSums(position, self._parameters[0].device)
        self._elements = sum(parameter.numel() for parameter in self._parameters)
        self._exchange = Exchange(grains_by_rank, numels)
        self._partitions: list[Tensor] = []
        self.loss_words = grains_by_rank[-1].stop
        self.norm = 0.0

    def compute(self, batch: Batch, forward: Forward, on_mask: OnMask) -> Tensor:
        """Compute this rank's grains and bring all together; (G,) losses, of which only this rank's are not 0."""
        size, losses = self._recipe.grain, torch.zeros(self.loss_words, device=batch.images.device, dtype=torch.float64)
        for number, grain in enumerate(self._grains):
            output = forward(batch, slice(number * size, (number + 1) * size))
            on_mask(output.mask)
            share = output.loss * (size / self._recipe.global_batch_size)
            gradients = torch.autograd.grad(share, self._parameters)
            self._sums.add(grain, functools.partial(self._fill, gradients))
            losses[grain] = share.detach()
        self._partitions = self._exchange.gather(self._sums.vectors())
        self.norm = exact_norm(self._partitions, self._elements)
        return losses

    def loss(self, words: Sequence[float]) -> float:
        """The mean loss over the global batch: its grains' shares, added in their order."""
        return float(sum(words))

    def are_finite(self) -> bool:
        """Whether all gradients are; the same on all ranks."""
        return math.isfinite(self.norm)

    def update(self) -> bool:
        """Update the weights; always true."""
        limit = self._recipe.clip_grad_norm
        if limit and self.norm > limit:
            for partition in self._partitions:
                partition.mul_(limit / (self.norm + 1e-6))
        give_gradients(self._engine, self._partitions)
        self._engine.step()
        self.discard()
        return True

    def discard(self) -> None:
        """Forget the gradients."""
        self._partitions = []
        self._sums.clear()

    def _fill(self, gradients: Sequence[Tensor], vector: Tensor) -> None:
        rooms = [
            vector[first : first + parameter.numel()].view_as(parameter)
            for first, parameter in zip(self._firsts, self._parameters, strict=True)
        ]
        torch._foreach_copy_(rooms, list(gradients))


def exact_norm(partitions: Sequence[Tensor], elements: int, all_reduce: Callable[..., Any] = dist.all_reduce) -> float:
    """Euclidean norm of what all ranks hold together; infinite where some element is not finite. Collective.

    Squares are rounded to multiples of one quantum, which follows from the largest element and from the number of
    elements, and added up as integers: the sum is the same however elements are dealt to ranks. The quantum is such
    that the sum fits into 62 bits, so that N elements err by N**2 / 2**62 of the largest square at most: 3e-3 of it for
    the 115 million of ConvMAE-Base, if every square were rounded the same way.

    Args:
        partitions: What this rank holds; zeros that fill it up add nothing.
        elements: Over all ranks, without what fills up: that depends on the world size.
        all_reduce: Of the ranks.
    """
    device = partitions[0].device
    largest = torch.zeros(1, device=device, dtype=torch.float64)
    for partition in partitions:
        largest = torch.maximum(largest, partition.abs().amax().double())
    largest = largest.nan_to_num(nan=math.inf, posinf=math.inf)
    all_reduce(largest, op=dist.ReduceOp.MAX)
    most = float(largest)
    if not math.isfinite(most) or most == 0.0:
        return most
    exponent = math.frexp(most)[1]
    bits = min(52, 62 - elements.bit_length())
    total = torch.zeros(1, device=device, dtype=torch.int64)
    for partition in partitions:
        for chunk in _chunks(partition):
            scaled = torch.ldexp(chunk.double(), torch.tensor(-exponent, device=device))
            total += torch.ldexp(scaled.square_(), torch.tensor(bits, device=device)).round_().long().sum()
    all_reduce(total)
    return math.ldexp(math.sqrt(math.ldexp(float(total), -bits)), exponent)


def state_digest(engine: deepspeed.DeepSpeedEngine, all_reduce: Callable[..., Any] = dist.all_reduce) -> str:
    """Of all weights and moments, bit by bit, with their places; the same at any world size. Collective.

    It is the sum, modulo 2**64, of each value's bits times an odd number that follows from its place in the model: a
    bit that is flipped anywhere changes it.
    """
    starts, position = {}, 0
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            starts[name] = position
            position += parameter.numel()
    total = torch.zeros(1, device=engine.device, dtype=torch.int64)
    for flat, pieces in owned_slices(engine):
        slots = adam_slots(engine, flat)
        kinds = [flat.data, *(slots[moment] for moment in MOMENTS if moment in slots)]
        for kind, values in enumerate(kinds):
            for piece in pieces:
                place = (kind * position) + starts[piece.name] + piece.start
                total += _bits(values[piece.offset : piece.offset + piece.length], place)
    all_reduce(total)
    return f"{int(total) % 2**64:016x}"


def _bits(values: Tensor, first: int) -> Tensor:
    """Sum of the values' bits, each times an odd number of its place, which counts from `first`."""
    return torch.stack(list(_bits_of_chunks(values, first))).sum()


def _bits_of_chunks(values: Tensor, first: int) -> Iterator[Tensor]:
    for chunk in _chunks(values):
        place = torch.arange(first, first + len(chunk), device=values.device) * _SPREAD
        weight = ((place ^ (place >> 31)) * _MIX) | 1
        yield (chunk.contiguous().view(torch.int32).long() * weight).sum()
        first += len(chunk)


def _chunks(values: Tensor) -> Iterator[Tensor]:
    return (values[first : first + _CHUNK] for first in range(0, len(values), _CHUNK))
