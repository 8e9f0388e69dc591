"""What a loader process does: it makes its part of each batch, one image at a time, and writes it into the ring."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import numpy as np

from pipeline.access.profile_keys import Keys
from pipeline.host.daemon_threads import DaemonThreads
from pipeline.image.augment import Draws
from pipeline.image.decode import Pixels
from pipeline.load.image_maker import Substitution
from pipeline.load.processes.messages import Assignment, End, Grant, KeysWanted, NewKeys, PartDone, PartFailed
from pipeline.load.processes.ring import DONE, READ, UNREAD, Ring, SharedActivities, Slot
from pipeline.load.read_ahead import Pending, ReadAhead
from pipeline.load.read_counters import ReadCounts
from pipeline.store.storage import Storage

STACKS_SIGNAL = signal.SIGUSR1
"""Has a process write the stacks of its threads to standard error, also while one holds the interpreter's lock."""
KEYS_SECONDS = 15.0
"""Longer than the rank asks for."""
LOOK_SECONDS = 1.0
"""Between two looks at what has been read, while an image is waited for."""


def make_parts(line: Connection) -> None:
    """Make what the first message of the line asks for; ends the process when the rank says so, or is gone."""
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL)
    try:
        assignment: Assignment = line.recv()
    except (EOFError, OSError):
        return
    _PartMaker(line, assignment).run()


@dataclass(eq=False)
class _Part:
    """The images of one batch that are made here."""

    step: int
    pending: list[Pending]
    draws: Draws
    slot: Slot
    pixels: Pixels
    """Of the slot."""
    next: int = 0
    """Of `pending`, that is not made."""
    unread: list[Pending] = field(default_factory=list)
    substitutions: list[tuple[int, Substitution]] = field(default_factory=list)
    read_seconds: float = 0.0
    decode_seconds: float = 0.0

    def note_read(self) -> None:
        """Let the rank see which images have been read."""
        waiting = [item for item in self.unread if not item.block.done()]
        if len(waiting) < len(self.unread):
            left = {item.place for item in waiting}
            self.slot.states[[item.place for item in self.unread if item.place not in left]] = READ
            self.unread = waiting


class _PartMaker:
    """One loader process. Its main thread decodes, others read, and one listens to the rank."""

    def __init__(self, line: Connection, assignment: Assignment) -> None:
        self._line, self._assignment = line, assignment
        self._ring = Ring.open(assignment.layout, assignment.ring_path)
        self._sending = threading.Lock()
        self._keys: queue.SimpleQueue[Keys | None] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._more = threading.Condition()
        self._granted = assignment.granted
        self._counts = ReadCounts()
        self._evictions = 0
        board = self._ring.boards[assignment.share.number]
        self._readers = DaemonThreads(board.rows - 1, "convmae-read")
        threading.Thread(target=self._listen, name="convmae-line", daemon=True).start()
        root = logging.getLogger()
        root.handlers[:] = [_ToRank(self._send)]
        root.setLevel(assignment.log_level)
        self._dataset = assignment.opener(self._storage())
        self._dataset.activities = SharedActivities(board)
        plan = assignment.plan
        self._maker = plan.image_maker(self._dataset, assignment.refused)
        self._ahead = ReadAhead(
            self._dataset,
            plan.order,
            plan.lanes,
            assignment.steps,
            self._readers,
            whole_windows=plan.whole_windows,
            share=assignment.share,
        )

    def run(self) -> None:
        """Make all parts, then wait for the end."""
        steps, parts = self._assignment.steps, deque[_Part]()
        step = steps.start
        while step < steps.stop or parts:
            while step < min(self._granted, steps.stop):  # reading may begin while earlier images are decoded
                parts.append(self._requested(step))
                step += 1
            if not parts:
                with self._more:
                    self._more.wait_for(lambda: self._granted > step)  # noqa: B023 - called before it changes
            elif parts[0].next < len(parts[0].pending):
                self._make_one(parts[0])
            else:
                self._report(parts.popleft())
        threading.Event().wait()

    def _requested(self, step: int) -> _Part:
        plan, pending = self._assignment.plan, self._ahead.request(step)
        slot = self._ring.slot(step - self._assignment.first_step)
        slot.states[[item.place for item in pending]] = UNREAD
        draws = plan.draws(step, np.array([item.sample_id for item in pending], np.int64))
        pixels = slot.pixels(plan.shape(step), plan.dtype)
        return _Part(step, pending, draws, slot, pixels, unread=pending)

    def _make_one(self, part: _Part) -> None:
        number, slot = part.next, part.slot
        part.next += 1
        item = part.pending[number]
        try:
            began = time.monotonic()
            part.note_read()
            while not item.block.done():
                with contextlib.suppress(TimeoutError):
                    item.block.exception(LOOK_SECONDS)
                part.note_read()
            found = item.result()
            read_at = time.monotonic()
            epoch = self._assignment.plan.order.epoch(part.step)
            place = item.place
            substitution = self._maker.fill(epoch, found, part.draws[number], part.pixels[place], slot.crops[place])
            slot.states[place] = DONE
            if substitution:
                part.substitutions.append((place, substitution))
            part.read_seconds += read_at - began
            part.decode_seconds += time.monotonic() - read_at
        except BaseException as error:
            self._send(PartFailed(part.step, _sendable(error)))

    def _report(self, part: _Part) -> None:
        now, cache = self._dataset.counters.read(), self._dataset.cache
        counts, self._counts = now.minus(self._counts), now
        evictions = cache.evictions if cache else 0
        more_evictions, self._evictions = evictions - self._evictions, evictions
        self._send(
            PartDone(
                part.step,
                part.substitutions,
                part.read_seconds,
                part.decode_seconds,
                counts,
                more_evictions,
                is_cache_off=cache is not None and not cache.storing,
            )
        )

    def _listen(self) -> None:
        while True:
            try:
                message = self._line.recv()
            except (EOFError, OSError):  # the rank is gone, however it ended
                os._exit(0)
            match message:
                case Grant(stop_step):
                    with self._more:
                        self._granted = stop_step
                        self._more.notify()
                case NewKeys(keys):
                    self._keys.put(keys)
                case End():
                    self._readers.shutdown(cancel_futures=True)
                    os._exit(0)

    def _send(self, message: object) -> None:
        # A rank that is gone ends this process in _listen().
        with self._sending, contextlib.suppress(OSError):
            self._line.send(message)

    def _storage(self) -> Storage:
        storage = self._assignment.storage
        return replace(storage, renewal=self._newer_keys) if self._assignment.asks_for_keys else storage

    def _newer_keys(self) -> Keys | None:
        """Those that the rank gets from whoever typed the command."""
        with self._asking:
            self._send(KeysWanted())
            try:
                return self._keys.get(timeout=KEYS_SECONDS)
            except queue.Empty:
                return None


class _ToRank(logging.Handler):
    """Sends what is logged here to be logged by the rank."""

    def __init__(self, send: Callable[[object], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        plain = logging.makeLogRecord(record.__dict__)
        plain.msg, plain.args = record.getMessage(), None
        if record.exc_info:
            plain.exc_text, plain.exc_info = logging.Formatter().formatException(record.exc_info), None
        self._send(plain)


def _sendable(error: BaseException) -> BaseException:
    """The error with its traceback as a note, which pickling keeps; another one where it cannot be pickled."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
