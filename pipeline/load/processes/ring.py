"""The memory that a rank shares with its loader processes: slots of batches, and what each process is at.

Nobody locks it. An image of a slot is written by one process and read by the rank, in turns that messages decide;
activities are read at any time, since they are wanted when something hangs or is dead.

    slot      pixels (n, C, H, W) uint8, crops (n, 5) int32, states (n,) uint8
    board     one row for each thread of a process: stage, start, sample, text
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.image.augment import CropRow
from pipeline.image.decode import Pixels
from pipeline.load.thread_activity import NO_SAMPLE, Stage, ThreadActivities, ThreadActivity

UNREAD, READ, DONE = range(3)
"""States of an image."""

_PAGE_BYTES = 4096
_STAGES: tuple[Stage, ...] = ("read", "decode")
_ROW = struct.Struct("=BxHxxxxdq")
"""Of a board: 0 or the stage from 1, bytes of the text, start, sample."""
_ROW_BYTES = 1024


@dataclass(frozen=True)
class RingLayout:
    """Where everything lies; the same on both sides."""

    slots: int
    batch_size: int
    """n, images of a batch."""
    image_bytes: int
    """For the pixels of one image, whose shape may differ from batch to batch."""
    processes: int
    threads: int
    """Of one process."""

    @property
    def pixel_bytes(self) -> int:
        """Of one slot."""
        return self.batch_size * self.image_bytes

    @property
    def slot_bytes(self) -> int:
        """A multiple of a page."""
        return _whole_pages(self.pixel_bytes + self.batch_size * (5 * 4 + 1) + 4)

    @property
    def board_bytes(self) -> int:
        """Of one process."""
        return self.threads * _ROW_BYTES

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.slots * self.slot_bytes + self.processes * self.board_bytes


class Slot:
    """The memory of one batch."""

    def __init__(self, layout: RingLayout, memory: mmap.mmap, number: int) -> None:
        start, n = number * layout.slot_bytes, layout.batch_size
        self._octets = np.frombuffer(memory, np.uint8, layout.pixel_bytes, start)
        self._images = n
        start += -(-layout.pixel_bytes // 4) * 4
        self.crops: CropRow = np.frombuffer(memory, np.int32, n * 5, start).reshape(n, 5)
        self.states: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8, n, start + n * 5 * 4)

    def pixels(self, shape: tuple[int, int, int], dtype: np.dtype[np.uint8 | np.uint16]) -> Pixels:
        """(n, C, H, W), in the first bytes of those that there are.

        Args:
            shape: C, H and W.
            dtype: Of a value.
        """
        size = self._images * math.prod(shape) * dtype.itemsize
        return self._octets[:size].view(dtype).reshape(self._images, *shape)


class Board:
    """What the threads of one process are doing."""

    def __init__(self, layout: RingLayout, memory: mmap.mmap, number: int) -> None:
        self._memory = memory
        self._start = layout.slots * layout.slot_bytes + number * layout.board_bytes
        self.rows = layout.threads

    def clear(self) -> None:
        """Forget the threads of a process that is dead, or not begun."""
        for row in range(self.rows):
            self.write(row, None)

    def write(self, row: int, activity: ThreadActivity | None) -> None:
        """What one thread is doing from now on; None: nothing."""
        at = self._start + row * _ROW_BYTES
        self._memory[at] = 0  # a reader, or a death, meanwhile finds nothing rather than a mixture
        if activity:
            text = activity.what.encode("utf-8", "replace")[: _ROW_BYTES - _ROW.size]
            self._memory[at + _ROW.size : at + _ROW.size + len(text)] = text
            _ROW.pack_into(self._memory, at, 0, len(text), activity.since_seconds, activity.sample_id)
            self._memory[at] = 1 + _STAGES.index(activity.stage)

    def read(self) -> list[ThreadActivity]:
        """What the threads are doing now."""
        found = []
        for row in range(self.rows):
            at = self._start + row * _ROW_BYTES
            stage, length, since_seconds, sample_id = _ROW.unpack_from(self._memory, at)
            if stage:
                text = self._memory[at + _ROW.size : at + _ROW.size + length].decode("utf-8", "replace")
                found.append(ThreadActivity(_STAGES[stage - 1], text, since_seconds, sample_id))
        return found

    def decoded_sample(self) -> int | None:
        """Id of the sample that is being decoded, or was when the process died."""
        return next((item.sample_id for item in self.read() if item.sample_id != NO_SAMPLE), None)


class Ring:
    """A view of the memory. Owns nothing: the memory ends with the last view of it."""

    def __init__(self, layout: RingLayout, memory: mmap.mmap) -> None:
        self.whole: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8, layout.size)
        self.slots = [Slot(layout, memory, number) for number in range(layout.slots)]
        self.boards = [Board(layout, memory, number) for number in range(layout.processes)]

    @classmethod
    def open(cls, layout: RingLayout, path: str) -> Ring:
        """That of the process which made it.

        Raises:
            OSError: It is gone, with its process.
        """
        handle = os.open(Path(path), os.O_RDWR)
        try:
            return cls(layout, mmap.mmap(handle, layout.size))
        finally:
            os.close(handle)

    def slot(self, number: int) -> Slot:
        """That of the batch with a number, counted from the first one."""
        return self.slots[number % len(self.slots)]


class SharedActivities(ThreadActivities):
    """Activities of a loader process's threads, which its rank can read whatever hangs here."""

    def __init__(self, board: Board) -> None:
        """Begin with none."""
        super().__init__()
        self._board = board
        self._rows: dict[int, int] = {}
        self._lock = threading.Lock()

    def note(self, thread: int, activity: ThreadActivity | None) -> None:
        """As of any; a thread that comes when all rows are taken is left out."""
        super().note(thread, activity)
        row = self._rows.get(thread)
        if row is None:
            with self._lock:
                row = self._rows[thread] = len(self._rows)
        if row < self._board.rows:
            self._board.write(row, activity)


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
