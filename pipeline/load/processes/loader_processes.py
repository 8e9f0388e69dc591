"""The rank's side of loader processes: it has them make its batches, and replaces those that die.

Each process makes the images of its blocks, in all batches; what they are depends on the order alone (Share). So a
process that takes over begins with the first batch of which the dead one delivered nothing, and writes the same pixels.

    consumer   start(step) -> Grant to all -> ... -> the batch's future
    listener   PartDone of all -> the batch leaves the ring, to the device, or by a copy on the CPU
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import torch

from pipeline.access.profile_keys import Keys
from pipeline.errors import LoaderProcessError
from pipeline.host.daemon_threads import SHUTDOWN_SECONDS, DaemonThreads
from pipeline.host.memory_file import MemoryFile
from pipeline.load.batch import SentBatch, StartedBatch, Unfinished
from pipeline.load.batch_plan import BatchPlan
from pipeline.load.dataset import Dataset
from pipeline.load.decode_threads import READ_THREADS
from pipeline.load.device_copy import DeviceCopy, StartedCopy
from pipeline.load.processes.fork_server import ForkServer
from pipeline.load.processes.messages import Assignment, End, Grant, KeysWanted, NewKeys, PartDone, PartFailed
from pipeline.load.processes.part_maker import STACKS_SIGNAL
from pipeline.load.processes.ring import DONE, UNREAD, Ring, RingLayout
from pipeline.load.thread_activity import Stage, oldest
from pipeline.order.shares import Share

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""How soon a thread of the rank that runs Python lets another one in. Python's own 5 ms would be waited for a few times
a batch, by threads that run for microseconds, beside a main thread that launches."""
LEAST_READ_THREADS = 2
"""Of one process: while one waits for the store, another may be served."""
MOST_DEATHS_ON_SAMPLE = 3
"""Processes that die while they decode the same sample, before it counts as one that does not decode."""
MOST_DEATHS_IN_A_ROW = 5
"""Processes that die without a delivery between them, and without a sample to blame, before the loader gives up."""
END_SECONDS = SHUTDOWN_SECONDS + 1.0
"""A process waits for what it is reading, as threads do."""


@dataclass(eq=False)
class _Process:
    """One loader process, or the place of one."""

    number: int
    next_step: int
    """The first step of which it has not delivered its part."""
    line: Connection | None = None
    pid: int = 0
    deaths_in_a_row: int = 0
    sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, message: object) -> None:
        """Send, unless it is dead, which the listener notices."""
        with self.sending, contextlib.suppress(OSError):
            if self.line:
                self.line.send(message)


class LoaderProcesses:
    """The makers of one rank's batches for some steps.

    Owns: the processes, their fork server and the ring, until close().
    Concurrency: start() and close() are called from one thread.
    Failure: an image that cannot be made fails its batch; a process that dies is replaced.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: BatchPlan,
        steps: range,
        device_copy: DeviceCopy,
        *,
        processes: int,
        slots: int,
    ) -> None:
        """Begin to start the processes.

        Args:
            dataset: Where the images are.
            plan: What batches there are.
            steps: That will be started, in turn.
            device_copy: Takes what is ready.
            processes: Each decodes one image at a time.
            slots: Batches that are under way at once, and have memory in the ring.
        """
        self._dataset, self._plan, self._steps, self._device_copy = dataset, plan, steps, device_copy
        threads = 1 + max(LEAST_READ_THREADS, -(-READ_THREADS // processes))
        self._layout = RingLayout(slots, plan.batch_size, plan.largest_image_bytes, processes, threads)
        self._memory = MemoryFile("convmae-loader", self._layout.size)
        self._ring = Ring(self._layout, self._memory.memory)
        self._pin = contextlib.ExitStack()
        self._pin.enter_context(device_copy.pinned(self._ring.whole))
        logger.info("%d loader processes share a ring of %d bytes", processes, self._layout.size)
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))
        self._processes = [_Process(number, steps.start) for number in range(processes)]
        self._server = ForkServer()
        self._batches: dict[int, StartedBatch] = {}
        self._copies: dict[int, StartedCopy] = {}
        """The newest out of each slot."""
        self._granted = steps.start
        self._deaths_on: Counter[int] = Counter()
        self._refused: dict[int, str] = {}
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._keys = DaemonThreads(1, "convmae-keys") if dataset.storage.renewal else None
        self._closing = threading.Event()
        self._woken, self._wake = Pipe(duplex=False)
        self._listener = threading.Thread(target=self._listen, name="convmae-processes", daemon=True)
        self._listener.start()

    def start(self, step: int) -> StartedBatch:
        """Have the next batch made; the one that had its slot must have left it."""
        number = step - self._steps.start
        slot, place = self._ring.slot(number), number % self._layout.slots
        if (last := self._copies.pop(place, None)) and last.copied:
            last.copied.synchronize()
        sample_ids = self._plan.sample_ids(step)
        on_host = self._device_copy.empty((len(sample_ids),), torch.int64)
        on_host[:] = torch.from_numpy(sample_ids)

        def send() -> SentBatch:
            copy = self._copies[place] = self._device_copy.start_from(
                slot.pixels(self._plan.shape(step), self._plan.dtype)
            )
            return SentBatch(copy, slot.crops.copy())

        def unfinished() -> list[Unfinished]:
            states = slot.states.tolist()
            pairs = zip(sample_ids.tolist(), states, strict=True)
            return [Unfinished(sample, state != UNREAD) for sample, state in pairs if state != DONE]

        slot.states[:] = UNREAD
        batch = StartedBatch(step, on_host, parts=len(self._processes), send=send, unfinished=unfinished)
        with self._lock:
            if self._error:
                batch.fail(self._error)
            self._batches[step] = batch
            self._granted = step + 1
            for process in self._processes:
                process.send(Grant(self._granted))
        return batch

    def oldest(self, stage: Stage) -> str:
        """The activity that has taken longest in a stage, for messages."""
        activities = [activity for board in self._ring.boards for activity in board.read()]
        return oldest(activities, stage, time.monotonic())

    def log_stacks(self) -> None:
        """Have each process write where its threads are to this process's standard error."""
        for process in self._processes:
            if process.line:  # its server keeps the pid until the process is replaced
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, STACKS_SIGNAL)

    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [process.pid for process in self._processes if process.line]

    def close(self) -> None:
        """End the processes."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._wake.send_bytes(b"")
        self._listener.join(2 * END_SECONDS)
        self._server.close()
        if self._keys:
            self._keys.shutdown(wait=False)
        self._pin.close()
        self._wake.close()
        self._batches.clear()  # they hold the ring
        sys.setswitchinterval(self._switch_seconds)

    def _listen(self) -> None:
        try:
            for process in self._processes:
                self._start_process(process)
            while not self._closing.is_set():
                self._attend(None)
        except BaseException as error:
            self._fail(error)
        self._end_processes()
        self._woken.close()

    def _attend(self, seconds: float | None) -> None:
        """Take what processes send, for so long at most; None: until something came."""
        lines = {process.line: process for process in self._processes if process.line}
        for ready in wait([*lines, *([] if self._closing.is_set() else [self._woken])], seconds):
            if process := lines.get(ready):  # type: ignore[call-overload]
                self._take(process)

    def _take(self, process: _Process) -> None:
        assert process.line
        try:
            message = process.line.recv()
        except (EOFError, OSError):
            self._gone(process)
            return
        match message:
            case PartDone():
                self._part_done(process, message)
            case PartFailed(step, error):
                self._batches[step].fail(error)
            case KeysWanted():
                assert self._keys
                self._keys.start(lambda: process.send(NewKeys(self._newer_keys())))
            case logging.LogRecord():
                source = logging.getLogger(message.name)
                if source.isEnabledFor(message.levelno):
                    source.handle(message)

    def _part_done(self, process: _Process, done: PartDone) -> None:
        process.next_step, process.deaths_in_a_row = done.step + 1, 0
        self._dataset.counters.add(**done.counts._asdict())
        if cache := self._dataset.cache:
            cache.evictions += done.evictions
            cache.storing = cache.storing and not done.is_cache_off
        batch = self._batches[done.step]
        batch.part_done(done.substitutions, read_seconds=done.read_seconds, decode_seconds=done.decode_seconds)
        if all(other.next_step > done.step for other in self._processes):
            del self._batches[done.step]

    def _gone(self, process: _Process) -> None:
        """Replace a process that died, unless nothing is left for it to do."""
        assert process.line
        began, pid = time.monotonic(), process.pid
        with process.sending:
            process.line.close()
            process.line = None
        if self._closing.is_set() or process.next_step >= self._steps.stop:
            return
        sample = self._ring.boards[process.number].decoded_sample()
        process.deaths_in_a_row += 1
        if sample is not None:
            self._deaths_on[sample] += 1
            if self._deaths_on[sample] >= MOST_DEATHS_ON_SAMPLE:
                self._refused[sample] = f"{self._deaths_on[sample]} processes died of it"
                process.deaths_in_a_row = 0
        ended = self._start_process(process)
        logger.warning(
            "loader process %d (pid %d) %s%s; pid %d replaced it in %.2f s",
            process.number,
            pid,
            ended,
            "" if sample is None else f" while it decoded sample {sample}",
            process.pid,
            time.monotonic() - began,
        )
        if process.deaths_in_a_row >= MOST_DEATHS_IN_A_ROW:
            raise LoaderProcessError(f"{process.deaths_in_a_row} loader processes died in a row; the last one {ended}")

    def _start_process(self, process: _Process) -> str:
        """Start it, or its successor; returns how the one before ended."""
        self._ring.boards[process.number].clear()
        ours, theirs = Pipe()
        with theirs:
            process.pid, ended = self._fork(theirs, process.pid)
        storage = self._dataset.storage
        with self._lock:
            assignment = Assignment(
                opener=self._dataset.opener(),
                storage=replace(storage, renewal=None),
                asks_for_keys=storage.renewal is not None,
                plan=self._plan,
                share=Share(process.number, len(self._processes)),
                first_step=self._steps.start,
                steps=range(process.next_step, self._steps.stop),
                granted=self._granted,
                refused=dict(self._refused),
                ring_path=str(self._memory.path),
                layout=self._layout,
                log_level=logging.getLogger("pipeline").getEffectiveLevel(),
            )
            process.line = ours
            process.send(assignment)  # before any grant
        return ended

    def _fork(self, line: Connection, previous: int) -> tuple[int, str]:
        for _ in range(MOST_DEATHS_IN_A_ROW):
            try:
                return self._server.fork(line.fileno(), previous)
            except OSError as error:
                if self._closing.is_set():
                    raise
                logger.warning("the fork server of loader processes does not answer (%s); another one starts", error)
                self._server.close()
                self._server = ForkServer()
        raise LoaderProcessError(f"{MOST_DEATHS_IN_A_ROW} fork servers of loader processes ended in a row")

    def _newer_keys(self) -> Keys | None:
        renewal = self._dataset.storage.renewal
        try:
            return renewal() if renewal else None
        except Exception as error:
            logger.warning("no newer keys for loader processes: %s: %s", type(error).__name__, error)
            return None

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            batches = list(self._batches.values())
        for batch in batches:
            batch.fail(error)

    def _end_processes(self) -> None:
        self._closing.set()
        for process in self._processes:
            process.send(End())
        deadline = time.monotonic() + END_SECONDS
        while any(process.line for process in self._processes) and time.monotonic() < deadline:
            self._attend(max(0.0, deadline - time.monotonic()))
        if left := self.pids():
            logger.warning("killed, since they are still busy: loader processes %s", ", ".join(map(str, left)))
