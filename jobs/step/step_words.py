"""The numbers that ranks add up once a step: to the device, through one all-reduce, and back with one wait.

All are float64, whose sums of integers are exact below 2**53. An integer of 64 bits travels as three parts, so that
sums over a million ranks are exact, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

INTEGER_WORDS = 3
"""Words of an integer of 64 bits."""
_PART_BITS = 22
_SHIFTS = range(0, INTEGER_WORDS * _PART_BITS, _PART_BITS)


def integer_words(value: Tensor) -> Tensor:
    """(3,) float64 words of an int64 tensor of one value, on its device."""
    return torch.cat([(value.view(1) >> shift) & _part_mask(shift) for shift in _SHIFTS]).double()


def words_of(value: int) -> list[float]:
    """The same of an integer on the host."""
    return [float((value >> shift) & _part_mask(shift)) for shift in _SHIFTS]


def integer_of(words: Sequence[float]) -> int:
    """The sum of integers whose words were added up, modulo 2**64."""
    return sum(int(word) << shift for word, shift in zip(words, _SHIFTS, strict=True)) % 2**64


def _part_mask(shift: int) -> int:
    return (1 << min(_PART_BITS, 64 - shift)) - 1


def wait_for(device: torch.device) -> None:
    """Wait for all that was asked of a GPU's current stream. The one place in a step where the host does."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class StepWords:
    """A vector of words, of which the device writes the first and the host the last.

    Owns: the vector and, for a GPU, two in pinned memory; they are used again step by step.
    """

    def __init__(
        self,
        of_device: int,
        of_host: int,
        device: torch.device,
        *,
        all_reduce: Callable[[Tensor], Any] = dist.all_reduce,
        wait: Callable[[torch.device], None] = wait_for,
    ) -> None:
        """Make room.

        Args:
            of_device: Words that the device writes.
            of_host: Words that the host writes.
            device: Where it trains.
            all_reduce: Of the ranks.
            wait: Returns when the device is done.
        """
        self._device, self._of_device, self._all_reduce, self._wait = device, of_device, all_reduce, wait
        on_gpu = device.type == "cuda"
        self._words = torch.zeros(of_device + of_host, device=device, dtype=torch.float64)
        self._sent = torch.zeros(of_host, dtype=torch.float64, device="cpu", pin_memory=on_gpu)
        self._received = torch.zeros(of_device + of_host, dtype=torch.float64, device="cpu", pin_memory=on_gpu)

    def of_host(self) -> NDArray[np.float64]:
        """(of_host,) zeros to be filled on the host, before `send`."""
        self._sent.zero_()
        return self._sent.numpy()

    def send(self) -> Tensor:
        """Send what the host has written; (of_device,) zeros to be filled on the device."""
        self._words.zero_()
        self._words[self._of_device :].copy_(self._sent, non_blocking=True)
        return self._words[: self._of_device]

    def add_up(self) -> NDArray[np.float64]:
        """(of_device + of_host,) the sums over all ranks, until the next step. Collective; waits for the device."""
        self._all_reduce(self._words)
        self._received.copy_(self._words, non_blocking=True)
        self._wait(self._device)
        return self._received.numpy()
