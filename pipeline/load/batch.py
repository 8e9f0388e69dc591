"""A batch of one rank: on its way, and as the consumer gets it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from pipeline.load.device_copy import StartedCopy

if TYPE_CHECKING:
    from pipeline.image.augment import CropRow
    from pipeline.load.image_maker import Substitution


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a step."""

    step: int
    epoch: int
    sample_ids: torch.Tensor
    """(n,) int64, on the host; lane after lane. What the order dealt, also where a substitute stands in."""
    images: torch.Tensor
    """(n, C, H, W) uint8 or uint16, on the device; safe to use on its current stream. H and W are of the epoch."""
    wait_seconds: float
    """How long the consumer waited for it; near zero where loading keeps up."""
    crops: CropRow
    """(n, 5): what each image shows of the one that it was cut from."""
    substitutions: tuple[Substitution, ...] = ()
    read_wait_seconds: float = 0.0
    """Of `wait_seconds`, for bytes; the rest for decoding. By what the decoders were busy with."""


class Unfinished(NamedTuple):
    """An image of a batch that is not ready."""

    sample_id: int
    is_read: bool
    """Whether its bytes are there, so that decoding is what it lacks."""


class SentBatch(NamedTuple):
    """The images of a batch, on their way to the device, and what they show."""

    copy: StartedCopy
    crops: CropRow


class StartedBatch:
    """A batch on its way; the last of its parts to be ready sends it to the device.

    One future for the whole batch: one an image would cost a lock and a wake-up of the consumer for each.
    """

    def __init__(
        self,
        step: int,
        sample_ids: torch.Tensor,
        *,
        parts: int,
        send: Callable[[], SentBatch],
        unfinished: Callable[[], list[Unfinished]],
    ) -> None:
        """Wait for its parts.

        Args:
            step: Whose batch it is.
            sample_ids: (n,) int64.
            parts: How often part_done() is called: once an image, or once a process that makes several.
            send: Starts the copy to the device; called once, by the thread that notes the last part.
            unfinished: The images that are not ready now, in the order of the batch.
        """
        self.step = step
        self.sample_ids = sample_ids
        self.substitutions: list[Substitution | None] = [None] * len(sample_ids)
        self.unfinished = unfinished
        self.read_seconds = self.decode_seconds = 0.0
        """Of all decoders: how long they waited for bytes, and how long they made images of these."""
        self.sent: Future[SentBatch] = Future()
        """Done when the copy to the device has started, or when the first image failed."""
        self._send = send
        self._left = parts
        self._lock = threading.Lock()

    def part_done(
        self, substitutions: Iterable[tuple[int, Substitution]], *, read_seconds: float, decode_seconds: float
    ) -> None:
        """Note that one more part is ready; called by any thread.

        Args:
            substitutions: What was replaced in it, each with its place in the batch.
            read_seconds: For which its decoder waited for bytes.
            decode_seconds: For which it then worked.
        """
        for place, substitution in substitutions:
            self.substitutions[place] = substitution
        with self._lock:
            self._left -= 1
            self.read_seconds += read_seconds
            self.decode_seconds += decode_seconds
            last = self._left == 0
        if last:
            try:
                self.sent.set_result(self._send())
            except BaseException as error:
                self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Note that an image cannot be made; only the first one counts."""
        with self._lock:
            if not self.sent.done():
                self.sent.set_exception(error)
