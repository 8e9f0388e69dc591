from __future__ import annotations

import math
import mmap
import threading

import numpy as np
import pytest

from pipeline.host.memory_file import MemoryFile
from pipeline.load.processes.ring import Ring, RingLayout, SharedActivities
from pipeline.load.thread_activity import ThreadActivity


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 7), (3, 1, 1)])
def test_no_two_parts_of_the_memory_overlap(shape: tuple[int, int, int]) -> None:
    layout = RingLayout(slots=3, batch_size=5, image_bytes=math.prod(shape), processes=2, threads=3)
    ring = Ring(layout, mmap.mmap(-1, layout.size))
    written = []
    for slot in ring.slots:
        for part in (slot.pixels(shape, np.dtype(np.uint8)), slot.crops, slot.states):
            part[:] = len(written) + 1
            written.append(part)
    for board in ring.boards:
        for row in range(board.rows):
            board.write(row, ThreadActivity("read", "x" * 5000, 1.5, 7))

    for number, part in enumerate(written):
        assert part.size and np.all(part == number + 1)
    for board in ring.boards:
        assert [len(item.what) for item in board.read()] == [1000] * board.rows


def test_the_slots_are_used_in_turn() -> None:
    layout = RingLayout(slots=2, batch_size=1, image_bytes=1, processes=1, threads=1)
    ring = Ring(layout, mmap.mmap(-1, layout.size))

    assert ring.slot(0) is ring.slot(2) and ring.slot(1) is ring.slot(5) is not ring.slot(0)


def test_what_one_view_writes_another_one_reads() -> None:
    layout = RingLayout(slots=1, batch_size=2, image_bytes=4, processes=1, threads=2)
    memory = MemoryFile("test", layout.size)
    ours, theirs = Ring(layout, memory.memory), Ring.open(layout, str(memory.path))
    activities = SharedActivities(theirs.boards[0])

    theirs.slots[0].pixels((1, 2, 2), np.dtype(np.uint8))[1] = 9
    with activities.doing("read", "an index"), activities.doing("decode", "a.jpg — of s3://b", 42):
        during = ours.boards[0].read()
        assert ours.boards[0].decoded_sample() == 42

    assert (ours.slots[0].pixels((1, 2, 2), np.dtype(np.uint8))[1] == 9).all()
    assert [(item.stage, item.what) for item in during] == [("decode", "a.jpg — of s3://b")]
    assert ours.boards[0].read() == [] and ours.boards[0].decoded_sample() is None


def test_threads_beyond_the_rows_are_left_out() -> None:
    layout = RingLayout(slots=1, batch_size=1, image_bytes=1, processes=2, threads=1)
    ring = Ring(layout, mmap.mmap(-1, layout.size))
    activities = SharedActivities(ring.boards[0])
    seen = []

    def other() -> None:
        with activities.doing("decode", "second"):
            seen.extend(ring.boards[0].read())

    with activities.doing("read", "first"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    assert [item.what for item in seen] == ["first"]
    assert ring.boards[1].read() == []
