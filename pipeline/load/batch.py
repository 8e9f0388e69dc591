"""A batch of one rank: on its way, and as the consumer gets it."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.load.device_copy import DeviceCopy, StartedCopy

if TYPE_CHECKING:
    from pipeline.image.augment import CropRow, Draws
    from pipeline.load.image_maker import Substitution
    from pipeline.load.read_ahead import Pending


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a step."""

    step: int
    epoch: int
    sample_ids: torch.Tensor
    """(n,) int64, on the host; lane after lane. What the order dealt, also where a substitute stands in."""
    images: torch.Tensor
    """(n, C, H, W) uint8 or uint16, on the device; safe to use on its current stream."""
    wait_seconds: float
    """How long the consumer waited for it; near zero where loading keeps up."""
    crops: CropRow
    """(n, 5): what each image shows of the one that it was cut from."""
    substitutions: tuple[Substitution, ...] = ()
    read_wait_seconds: float = 0.0
    """Of `wait_seconds`, for bytes; the rest for decoding. By what the decoding threads were busy with."""


class StartedBatch:
    """A batch on its way; the last of its images to be ready sends it to the device.

    One future for the whole batch: one an image would cost a lock and a wake-up of the consumer for each.
    """

    def __init__(
        self,
        step: int,
        pending: list[Pending],
        draws: Draws,
        image_shape: tuple[int, int, int],
        device_copy: DeviceCopy,
        *,
        dtype: torch.dtype,
    ) -> None:
        self.step = step
        self.pending = pending
        self.draws = draws
        """(n, ...), of the images' crops."""
        self.sample_ids = device_copy.empty((len(pending),), torch.int64)
        self.sample_ids[:] = torch.tensor([item.sample_id for item in pending], device="cpu")
        self.images = device_copy.empty((len(pending), *image_shape), dtype)
        self.pixels = self.images.numpy()
        """The same memory."""
        self.crops: CropRow = np.zeros((len(pending), 5), dtype=np.int32)
        self.substitutions: list[Substitution | None] = [None] * len(pending)
        self.done = [False] * len(pending)
        self.read_seconds = self.decode_seconds = 0.0
        """Of all threads: how long they waited for bytes, and how long they made images of these."""
        self.copy: Future[StartedCopy] = Future()
        """Done when the copy to the device has started, or when the first image failed."""
        self._device_copy = device_copy
        self._left = len(pending)
        self._lock = threading.Lock()

    def image_done(
        self, place: int, substitution: Substitution | None, *, read_seconds: float, decode_seconds: float
    ) -> None:
        """Note that one more image is ready; called by the thread that made it.

        Args:
            place: In the batch.
            substitution: How it was replaced.
            read_seconds: For which the thread waited for its bytes.
            decode_seconds: For which it then worked.
        """
        self.substitutions[place] = substitution
        self.done[place] = True
        with self._lock:
            self._left -= 1
            self.read_seconds += read_seconds
            self.decode_seconds += decode_seconds
            last = self._left == 0
        if last:
            try:
                self.copy.set_result(self._device_copy.start(self.images))
            except BaseException as error:
                self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Note that an image cannot be made; only the first one counts."""
        with self._lock:
            if not self.copy.done():
                self.copy.set_exception(error)
