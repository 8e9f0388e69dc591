"""The ranks that restore together, and what they exchange: values, errors, bits, and sums in place.

Every method is collective: all ranks call the same ones in the same order, even when one of them found damage, for
which `together` exists. What a rank receives does not grow with the number of ranks, except by `gathered`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UserError

BUCKET_BYTES = 64 << 20
"""Added up at a time: what NCCL holds on the device, and gloo in buffers."""
WORD_BYTES = 8
"""What is added up in place is a multiple of this."""

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """One rank's place in torch's default process group; a single rank communicates nothing."""

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    """Where NCCL finds tensors; gloo takes those of the CPU."""

    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's part of something.

        Raises:
            UserError: What `work` raised on the lowest rank on which it did; the same on all.
        """
        result: T | None = None
        error: UserError | None = None
        try:
            result = work()
        except UserError as raised:
            error = raised
        first = self._lowest(self.rank if error else self.world_size)
        if first < self.world_size and (found := self.broadcast(error, source=first)):
            raise found
        return cast(T, result)

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value of rank `source`."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=source)
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, by rank; each takes as many bytes as the longest."""
        by_rank: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(by_rank, value)
        return by_rank

    def add_up(self, values: Tensor) -> None:
        """Fill in place a tensor of which each rank has a part, and zeros elsewhere.

        Args:
            values: (n,) bytes on the CPU, n a multiple of WORD_BYTES.
        """
        if self.world_size == 1:
            return
        # Sums of whole words: all ranks but one have zero in each byte, so nothing is carried over.
        for bucket in torch.split(values.view(torch.int64), BUCKET_BYTES // WORD_BYTES):
            moved = bucket.to(self.device)
            dist.all_reduce(moved)
            if moved is not bucket:
                bucket.copy_(moved)

    def total(self, count: int) -> int:
        """Sum over ranks."""
        return int(self._reduced(torch.tensor([count], device="cpu"), dist.ReduceOp.SUM).item())

    def union(self, bits: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of n bits are set on some rank."""
        words = torch.from_numpy(bits.astype(np.uint8))
        return self._reduced(words, dist.ReduceOp.MAX).numpy().astype(np.bool_)

    def _lowest(self, number: int) -> int:
        return int(self._reduced(torch.tensor([number], device="cpu"), dist.ReduceOp.MIN).item())

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.world_size == 1 or not values.numel():
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved, op=operation)
        return moved.cpu()


class Room:
    """Room for tensors, in one piece that ranks can add up; initially zeros."""

    def __init__(self, kinds: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        """Allocate it.

        Args:
            kinds: Shape and type of each tensor, by name.
        """
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in kinds.items()}
        starts = [0, *itertools.accumulate(-(-size // WORD_BYTES) * WORD_BYTES for size in sizes.values())]
        self.bytes = torch.zeros(starts[-1], device="cpu", dtype=torch.uint8)
        self.tensors: Mapping[str, Tensor] = {
            name: self.bytes[start : start + sizes[name]].view(dtype).view(tuple(shape))
            for start, (name, (shape, dtype)) in zip(starts, kinds.items(), strict=False)
        }
