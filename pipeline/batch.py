"""A batch of one rank: on its way, and as the consumer gets it."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from pipeline.hand_over import HandOver, Moving
from pipeline.image_maker import Substitution
from pipeline.read_ahead import Pending


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a step."""

    step: int
    epoch: int
    sample_ids: torch.Tensor
    """(n,) int64, on the host; lane after lane. What the order dealt, also where a substitute stands in."""
    images: torch.Tensor
    """(n, 3, H, W) uint8, on the device; safe to use on its current stream."""
    wait_seconds: float
    """How long the consumer waited for it; near zero where loading keeps up."""
    substitutions: tuple[Substitution, ...] = ()


class StartedBatch:
    """A batch on its way; the last of its images to be ready sends it to the device."""

    def __init__(self, step: int, pending: list[Pending], image_shape: tuple[int, int], hand_over: HandOver) -> None:
        self.step = step
        self.pending = pending
        self.sample_ids = hand_over.empty((len(pending),), torch.int64)
        self.sample_ids[:] = torch.tensor([item.sample_id for item in pending])
        self.images = hand_over.empty((len(pending), 3, *image_shape), torch.uint8)
        self.decoding: list[Future[Substitution | None]] = [Future() for _ in pending]
        self.moving: Future[Moving] = Future()
        self._hand_over = hand_over
        self._left = len(pending)
        self._lock = threading.Lock()

    def image_done(self) -> None:
        """Note that one more image is ready, or failed; called by the thread that made it."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            try:
                self.moving.set_result(self._hand_over.start(self.images))
            except BaseException as error:
                self.moving.set_exception(error)
