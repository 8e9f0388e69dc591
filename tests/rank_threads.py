"""Ranks in threads, with the parts of torch.distributed that restoring and the exchange of gradients need."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch


class Ranks:
    """One thread per rank; stands in for the module torch.distributed."""

    ReduceOp = SimpleNamespace(SUM=torch.add, MIN=torch.minimum, MAX=torch.maximum)

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._given: list[Any] = [None] * world_size
        self._mine = threading.local()

    def all_gather_object(self, by_rank: list[Any], value: Any) -> None:
        self._given[self._mine.rank] = value
        self._barrier.wait()
        by_rank[:] = self._given
        self._barrier.wait()

    def broadcast_object_list(self, values: list[Any], src: int) -> None:
        by_rank: list[Any] = []
        self.all_gather_object(by_rank, values[0])
        values[0] = by_rank[src]

    def all_reduce(self, values: torch.Tensor, op: Callable[..., torch.Tensor] = torch.add) -> None:
        by_rank: list[torch.Tensor] = []
        self.all_gather_object(by_rank, values.clone())
        values.copy_(functools.reduce(op, by_rank))

    def all_to_all_single(
        self,
        got: torch.Tensor,
        sent: torch.Tensor,
        got_splits: list[int],
        sent_splits: list[int],
        *,
        async_op: bool,  # noqa: ARG002
    ) -> SimpleNamespace:
        by_rank: list[Any] = []
        self.all_gather_object(by_rank, sent.clone().split(sent_splits))
        parts = [of_rank[self._mine.rank] for of_rank in by_rank]
        assert [len(part) for part in parts] == got_splits
        got.copy_(torch.cat(parts))
        return SimpleNamespace(wait=lambda: None)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """The results of `work` on all ranks; raises what it raised on any."""

        def rank_work(rank: int) -> Any:
            self._mine.rank = rank
            try:
                return work(rank)
            except Exception as error:
                self._barrier.abort()  # the others would wait for it
                return error

        with ThreadPoolExecutor(len(self._given)) as threads:
            results = list(threads.map(rank_work, range(len(self._given))))
        errors = [result for result in results if isinstance(result, Exception)]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return results
