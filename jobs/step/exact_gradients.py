"""Gradients, their norm and the digest of what they made of the weights, to the bit the same at any world size.

With ZeRO 1 and 2 every rank holds all weights, so that gradients of one grain after the other can be taken by
`torch.autograd.grad`, past DeepSpeed's hooks: these would add them up in an order that depends on the world size. What
is summed by `jobs.step.gradient_tree` is handed to DeepSpeed's optimizer as its partition of the averaged gradients.
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

from jobs.checkpoint.deepspeed_internals import (
    MOMENTS,
    adam_slots,
    give_gradients,
    owned_slices,
    parameter_groups_in_order,
)
from jobs.recipe.recipe import Recipe
from jobs.step.compute_probe import ComputeProbe
from jobs.step.gradient_tree import Exchange, PartialSums
from jobs.step.step_words import INTEGER_WORDS, integer_of, integer_words
from model.convmae import Output
from pipeline.load.batch import Batch

if TYPE_CHECKING:
    import deepspeed

_KINDS = 1 + len(MOMENTS)
"""Values that each trained element has: its own and its moments."""
Forward = Callable[[Batch, slice], Output]
"""The model's output for some images of a rank's part of the global batch."""
OnMask = Callable[[Tensor], None]
"""Is given the mask of each image that is trained on."""
OnGradients = Callable[[int, Sequence[Tensor]], None]
NORM_WORDS = 2 + INTEGER_WORDS
"""Largest exponent, whether something is not finite, and the sum of squares."""
_CHUNKS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that are looked at together, in 64 bits: a core's cache holds them; a GPU is busy with them."""
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

    Attributes are those of `jobs.step.training_step.Gradients`. Words: a loss for each grain, and the norm's.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        recipe: Recipe,
        grains_by_rank: Sequence[range],
        rank: int,
        probe: ComputeProbe,
    ) -> None:
        """Lay out the vectors; every rank alike.

        Args:
            engine: Of ZeRO 1 or 2, which neither clips nor accumulates.
            recipe: Says how large grains are, and at which norm gradients are clipped.
            grains_by_rank: From `grains_of_ranks`.
            rank: This one.
            probe: Times what this rank computes by itself.
        """
        self._engine, self._recipe, self._grains, self._rank = engine, recipe, grains_by_rank[rank], rank
        self._probe = probe
        self.grains = len(self._grains)
        """Of this rank."""
        self.on_gradients: OnGradients = lambda *_: None
        """Is given the gradients of each of this rank's grains, by its number, as they are used."""
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
        self._exchange = Exchange(grains_by_rank, numels, rank)
        self._partitions: list[Tensor] = []
        self.loss_words = grains_by_rank[-1].stop
        self.words = self.loss_words + NORM_WORDS
        self.norm = 0.0

    def compute(self, batch: Batch, forward: Forward, on_mask: OnMask, words: Tensor) -> None:
        """Compute this rank's grains and bring all together."""
        size = self._recipe.grain
        for number, grain in enumerate(self._grains):
            with self._probe.computing():
                output, gradients = self.of_grain(batch, forward, number)
                on_mask(output.mask)
                self.on_gradients(number, gradients)
                self._sums.add(grain, functools.partial(self._write, gradients))
            self._exchange.send_complete(self._sums.vectors())
            words[grain] = output.loss.detach() * (size / self._recipe.global_batch_size)
        self._partitions = self._exchange.gather(self._sums.vectors())
        words[self.loss_words :] = norm_words(self._partitions, self._elements, rank=self._rank)

    def of_grain(self, batch: Batch, forward: Forward, number: int) -> tuple[Output, tuple[Tensor, ...]]:
        """The output for a grain, and its gradients, by parameter: those of its share of the mean loss.

        Args:
            batch: Grains in turn.
            forward: The model's output.
            number: Of the grain in the batch.
        """
        size = self._recipe.grain
        output = forward(batch, slice(number * size, (number + 1) * size))
        share = output.loss * (size / self._recipe.global_batch_size)
        return output, torch.autograd.grad(share, self._parameters)

    def digest(self, gradients: Sequence[Tensor]) -> Tensor:
        """(1,) int64 of all bits of gradients, by parameter."""
        whole = torch.cat([gradient.detach().float().flatten() for gradient in gradients])
        return _bits(whole, 0).view(1)

    def read(self, words: Sequence[float]) -> tuple[float, bool]:
        """The mean loss, of its grains' shares in their order, and whether all gradients are finite."""
        self.norm = norm_of(words[self.loss_words :], self._elements)
        return float(sum(words[: self.loss_words])), math.isfinite(self.norm)

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

    def _write(self, gradients: tuple[Tensor, ...], vector: Tensor, add: bool) -> None:
        rooms = [
            vector[first : first + parameter.numel()].view_as(parameter)
            for first, parameter in zip(self._firsts, self._parameters, strict=True)
        ]
        if add:
            torch._foreach_add_(rooms, gradients)
        else:
            torch._foreach_copy_(rooms, gradients)


def norm_words(
    partitions: Sequence[Tensor], elements: int, *, rank: int, all_reduce: Callable[..., Any] = dist.all_reduce
) -> Tensor:
    """(NORM_WORDS,) of the Euclidean norm of what all ranks hold together, to be added up over them. Collective.

    Squares are rounded to multiples of one quantum, which follows from the largest element and from the number of
    elements, and added up as integers: the sum is the same however elements are dealt to ranks. The quantum is such
    that the sum fits into 62 bits, so that N elements err by N**2 / 2**62 of the largest square at most: 3e-3 of it for
    the 115 million of ConvMAE-Base, if every square were rounded the same way.

    Args:
        partitions: What this rank holds; zeros that fill it up add nothing.
        elements: Over all ranks, without what fills up: that depends on the world size.
        rank: This one; rank 0 alone writes what all ranks know.
        all_reduce: Of the ranks.
    """
    largest = torch.stack([partition.abs().amax() for partition in partitions]).amax().double()
    largest = largest.nan_to_num(nan=math.inf, posinf=math.inf).view(1)
    all_reduce(largest, op=dist.ReduceOp.MAX)
    is_finite = largest.isfinite()
    exponent = torch.frexp(torch.where(is_finite, largest, 0.0)).exponent
    scale = torch.ldexp(torch.ones_like(largest), _square_bits(elements) // 2 - exponent)
    total = torch.zeros(1, device=largest.device, dtype=torch.int64)
    for partition in partitions:
        for chunk in _chunks(partition):
            total += (chunk.double() * scale).square_().round_().long().sum()
    known = torch.cat([exponent.double(), (~is_finite).double()])
    return torch.cat([known if rank == 0 else torch.zeros_like(known), integer_words(total)])


def norm_of(words: Sequence[float], elements: int) -> float:
    """The norm, of the sums of all ranks' `norm_words`; infinite where some element is not finite."""
    exponent, not_finite, *total = words
    if not_finite:
        return math.inf
    squares = math.ldexp(float(integer_of(total)), -_square_bits(elements))
    return math.ldexp(math.sqrt(squares), int(exponent))


def _square_bits(elements: int) -> int:
    """Bits of the largest square, which is below 1 when it is scaled: an even number."""
    return min(52, 62 - elements.bit_length()) // 2 * 2


def digest_words(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """(INTEGER_WORDS,) of a digest of all weights and moments, to be added up over ranks; of those of this rank.

    It is the sum, modulo 2**64, of each value's bits times an odd number that follows from its place in the model: a
    bit that is flipped anywhere changes it, and it is the same at any world size. Frozen weights and buffers, which
    every rank has whole, are counted on rank 0.
    """
    starts, position, frozen = {}, 0, []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            starts[name] = position
            position += parameter.numel()
        else:
            frozen.append(parameter.detach().float().flatten())
    frozen += [value.float().flatten() for value in engine.module.buffers() if value.is_floating_point()]
    total = torch.zeros(1, device=engine.device, dtype=torch.int64)
    if frozen and dist.get_rank() == 0:
        total += _bits(torch.cat(frozen), _KINDS * position)
    for flat, pieces in owned_slices(engine):
        slots = adam_slots(engine, flat)
        kinds = [flat.data, *(slots[moment] for moment in MOMENTS if moment in slots)]
        for kind, values in enumerate(kinds):
            for piece in pieces:
                place = (kind * position) + starts[piece.name] + piece.start
                total += _bits(values[piece.offset : piece.offset + piece.length], place)
    return integer_words(total)


def digest_of(words: Sequence[float]) -> str:
    """The digest, of the sums of all ranks' `digest_words`."""
    return f"{integer_of(words):016x}"


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
    size = _CHUNKS[values.device.type]
    return (values[first : first + size] for first in range(0, len(values), size))
