"""Gradients, their norm and the digest of what they made of the weights, to the bit the same at any world size.

With ZeRO 1 and 2 every rank holds all weights, so that gradients of one grain after the other can be taken by
`torch.autograd.grad`, past DeepSpeed's hooks: these would add them up in an order that depends on the world size. What
is summed by `jobs.rank.gradient_tree` is handed to DeepSpeed's optimizer as its partition of the averaged gradients.
Sums over elements, of squares and of bits, are sums of integers, whose order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.checkpoint.zero_state import MOMENTS, group_slices
from jobs.rank.gradient_tree import Exchange, PartialSums

if TYPE_CHECKING:
    import deepspeed

_CHUNK = 1 << 20
"""Elements that are looked at together: in 64 bits they are twice as large."""
_SPREAD, _MIX = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)
"""Odd constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed integers."""


def grains_of_ranks(lanes_by_rank: Sequence[range], grains_per_lane: int) -> list[range]:
    """The grains of each rank: all those of its lanes, which lie one after the other in the global batch."""
    return [range(lanes.start * grains_per_lane, lanes.stop * grains_per_lane) for lanes in lanes_by_rank]


class ExactGradients:
    """The sum over the grains of the global batch, of which this rank computes some and gets its partition."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, grains_by_rank: Sequence[range], rank: int) -> None:
        """Lay out the vectors; every rank alike.

        Args:
            engine: Of ZeRO 1 or 2, in fp32.
            grains_by_rank: From `grains_of_ranks`.
            rank: This one.
        """
        self._optimizer: Any = engine.optimizer
        self._parameters: list[Tensor] = []
        self._firsts: list[int] = []
        numels, position = [int(size) for size in self._optimizer.partition_size], 0
        for numel, group in zip(numels, self._optimizer.round_robin_bit16_groups, strict=True):
            first = position
            for parameter in group:
                self._parameters.append(parameter)
                self._firsts.append(first)
                first += parameter.numel()
            position += numel * len(grains_by_rank)
        self._sums = PartialSums(position, self._parameters[0].device)
        self._exchange = Exchange(grains_by_rank, rank, numels)
        self.partitions: list[Tensor] = []
        """This rank's part of the sum, for each group; there from `reduce` to `hand_over`."""

    def add(self, grain: int, loss: Tensor) -> None:
        """Add the gradient of one grain's share of the mean loss; grains come in their order."""
        gradients = torch.autograd.grad(loss, self._parameters)

        def fill(vector: Tensor) -> None:
            rooms = [
                vector[first : first + parameter.numel()].view_as(parameter)
                for first, parameter in zip(self._firsts, self._parameters, strict=True)
            ]
            torch._foreach_copy_(rooms, list(gradients))

        self._sums.add(grain, fill)

    def reduce(self) -> None:
        """Bring together what all ranks have added. Collective."""
        self.partitions = self._exchange.gather(self._sums.vectors())

    def hand_over(self, factor: float) -> None:
        """Give the sum to the optimizer, whose next step updates by it.

        Args:
            factor: What it is multiplied by: below 1 where the norm is clipped.
        """
        for index, partition in enumerate(self.partitions):
            self._optimizer.averaged_gradients[index] = [partition if factor == 1.0 else partition.mul_(factor)]
        self.forget()

    def forget(self) -> None:
        """Make ready for the next step."""
        self.partitions = []
        self._sums.clear()


def exact_norm(
    partitions: Sequence[Tensor],
    all_reduce: Callable[..., Any] = dist.all_reduce,
) -> float:
    """Euclidean norm of what all ranks hold together; infinite where some element is not finite. Collective.

    Squares are rounded to multiples of one quantum, which follows from the largest element of all, and added up as
    integers: the sum is the same however elements are dealt to ranks. With N elements the relative error is at most
    N / 2**(62 - log2 N) of the largest square: 2e-3 of it for a billion elements, when all squares are rounded one way.
    """
    device = partitions[0].device
    largest = torch.zeros(1, device=device, dtype=torch.float64)
    count = torch.tensor([sum(map(len, partitions))], device=device)
    for partition in partitions:
        largest = torch.maximum(largest, partition.abs().amax().double())
    largest = largest.nan_to_num(nan=math.inf, posinf=math.inf)
    all_reduce(largest, op=dist.ReduceOp.MAX)
    all_reduce(count)
    most = float(largest)
    if not math.isfinite(most) or most == 0.0:
        return most
    exponent = math.frexp(most)[1]
    bits = min(52, 62 - int(count).bit_length())
    total = torch.zeros(1, device=device, dtype=torch.int64)
    for partition in partitions:
        for chunk in partition.split(_CHUNK):
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
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    total = torch.zeros(1, device=engine.device, dtype=torch.int64)
    optimizer = engine.optimizer
    for flat, pieces in group_slices(optimizer, names):
        slots = optimizer.optimizer.state.get(flat, {})
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
    for chunk in values.split(_CHUNK):
        place = torch.arange(first, first + len(chunk), device=values.device) * _SPREAD
        weight = ((place ^ (place >> 31)) * _MIX) | 1
        yield (chunk.contiguous().view(torch.int32).long() * weight).sum()
        first += len(chunk)
