"""The time that a rank computes by itself in a step, before it meets the others. A `WorkerProbe`.

On a GPU by events on the stream that computes, which are read after the step's one wait: no other is added. What the
stream waits for in between, a host that launches late among it, counts. On a CPU by the host's clock, so that a process
that is stopped counts, too.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from jobs.health.interface import ProbeResult


class ComputeProbe:
    """The clock of one rank's own computing.

    Owns: on a GPU two events for each stretch of a step, which are used again. Concurrency: the training thread's.
    """

    name = "compute"

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        """Measure nothing yet.

        Args:
            device: Where it trains.
            clock: Seconds, of the host.
        """
        self._device, self._clock = device, clock
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._stretches = 0
        self._seconds = 0.0
        self._result = ProbeResult()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around a stretch of a step in which this rank waits for no other; there may be several."""
        if self._device.type != "cuda":
            began = self._clock()
            yield
            self._seconds += self._clock() - began
            return
        if self._stretches == len(self._events):
            timing: Any = functools.partial(torch.cuda.Event, enable_timing=True)
            self._events.append((timing(), timing()))
        begin, end = self._events[self._stretches]
        begin.record(torch.cuda.current_stream(self._device))
        yield
        end.record(torch.cuda.current_stream(self._device))
        self._stretches += 1

    def stepped(self, images: int) -> None:
        """Note the end of a step's stretches, once the device is done with them.

        Args:
            images: For which this rank computed.
        """
        on_device = sum(begin.elapsed_time(end) for begin, end in self._events[: self._stretches]) / 1000
        self._result = ProbeResult({"compute_seconds": self._seconds + on_device, "images": images})
        self._stretches, self._seconds = 0, 0.0

    def poll(self) -> ProbeResult:
        """Seconds of the last step, and for how many images; nothing before the first."""
        return self._result
