"""Batches on their way to the device: pinned memory, and a copy on a stream of its own.

The copy of a batch starts when its last image is ready, while the device still works on batches before it; the host
does not wait for it. On the CPU the same calls pass the host's tensor on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, eq=False)
class StartedCopy:
    """Images whose copy to the device has been started."""

    images: torch.Tensor
    copied: torch.cuda.Event | None


class DeviceCopy:
    """Copies to one device.

    Concurrency: start() is called from any thread; finish() from the one that uses the images.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream, where the device is a GPU."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory to fill; pinned where a GPU will copy it. PyTorch's own allocator pools pinned memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    @contextlib.contextmanager
    def pinned(self, memory: npt.NDArray[np.uint8]) -> Iterator[None]:
        """Pin memory that other processes write, while the block runs, where a GPU copies it."""
        if self._stream is None:
            yield
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        try:
            yield
        finally:
            self._stream.synchronize()  # the copy that is under way reads it
            torch.cuda.check_error(runtime.cudaHostUnregister(memory.ctypes.data))

    def start_from(self, reused: npt.NDArray[np.uint8 | np.uint16]) -> StartedCopy:
        """Begin to copy memory that will be written again: once this copy is done on a GPU, at once on the CPU."""
        # NumPy copies in this thread, torch with several of its own.
        return self.start(torch.from_numpy(reused.copy() if self._stream is None else reused))

    def start(self, host: torch.Tensor) -> StartedCopy:
        """Begin to copy; returns at once."""
        if self._stream is None:
            return StartedCopy(host, None)
        with torch.cuda.stream(self._stream):
            images = host.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        return StartedCopy(images, copied)

    def finish(self, copy: StartedCopy) -> torch.Tensor:
        """The images, for use on the current stream; the stream waits for the copy, the host does not."""
        if copy.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copy.copied)
            copy.images.record_stream(current)  # its memory was allocated on the copying stream
        return copy.images
