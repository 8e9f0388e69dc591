"""The watch for ranks that stand still: stopped processes, and ranks that hang in a collective, a kernel or a lock.

Every rank reports to the monitor now and then, from a thread of its own, how far it is. The monitor judges: a rank that
does not speak is stopped, or holds the interpreter's lock; of ranks that speak and do not move, those furthest behind
hold up the others. What is found is looked at on its own node (state, Python stack) and killed, so that the attempt
restarts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline.host.process_identity import ProcessIdentity
from pipeline.host.scratch import scratch_folder

if TYPE_CHECKING:
    from ray.actor import ActorHandle

START_ALLOWED_SECONDS = 900.0
"""To fetch a checkpoint and build the engine, beyond the limit."""
SAVE_ALLOWED_SECONDS = 300.0
"""To wait for storage, which retries for 120 s and names its own failure, beyond the limit."""
COMPILE_ALLOWED_SECONDS = 1800.0
DUMP_SECONDS = 5.0
EXAMINE_SECONDS = 30.0
"""For a task on the node of a rank that hangs; a node that was cut off does not answer."""
STACK_SIGNAL = signal.SIGUSR1

_STATES = {
    psutil.STATUS_STOPPED: "stopped (T), as by SIGSTOP",
    psutil.STATUS_TRACING_STOP: "stopped (t), by a debugger",
    psutil.STATUS_DISK_SLEEP: "in a system call that cannot be interrupted (D)",
    psutil.STATUS_ZOMBIE: "dead (Z)",
}


@dataclass(frozen=True)
class Pulse:
    """What a rank says of itself."""

    attempt: int
    rank: int
    host: str
    node_id: str
    process: ProcessIdentity
    stack_path: str
    """File on its node to which STACK_SIGNAL makes it write its stacks."""
    phase: str
    moves: int
    """Phases begun. Ranks go through the same ones, so that the smallest is furthest behind."""
    allowed_seconds: float
    """How much longer than the limit this phase may take."""


class RankPulse:
    """One rank's thread that reports to the monitor how far it is.

    Owns: the thread, and the file for stacks. Concurrency: `at` is called by the training thread. Failure: a monitor
    that is unreachable is not waited for. Blocking: nothing but `close`, for a moment.
    """

    def __init__(
        self, monitor: ActorHandle[Any], *, attempt: int, rank: int, node_id: str, limit_seconds: float
    ) -> None:
        """Start the thread, and let STACK_SIGNAL dump the stacks of this process's threads into a file."""
        self._monitor = monitor
        self._folder = scratch_folder()
        path = Path(self._folder.name, "stacks.txt")
        self._stacks = path.open("w", encoding="utf-8")
        # Written by a C handler: also while another thread holds the interpreter's lock.
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
        self._fixed: dict[str, Any] = {
            "attempt": attempt,
            "rank": rank,
            "host": socket.gethostname(),
            "node_id": node_id,
            "process": ProcessIdentity.here(),
            "stack_path": str(path),
        }
        self._phase = ("start", 0, START_ALLOWED_SECONDS)
        self._ended = threading.Event()
        self._interval_seconds = min(10.0, max(0.5, limit_seconds / 10))
        threading.Thread(target=self._beat, name="convmae-pulse", daemon=True).start()

    def at(self, phase: str, allowed_seconds: float = 0.0) -> None:
        """Note that a phase begins; every rank must go through the same phases.

        Args:
            phase: For people.
            allowed_seconds: How much longer than the limit it may take.
        """
        self._phase = (phase, self._phase[1] + 1, allowed_seconds)

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        faulthandler.unregister(STACK_SIGNAL)
        self._stacks.close()
        self._folder.cleanup()

    def _beat(self) -> None:
        while True:
            phase, moves, allowed = self._phase
            pulse = Pulse(**self._fixed, phase=phase, moves=moves, allowed_seconds=allowed)
            with contextlib.suppress(Exception):
                self._monitor.pulse.remote(pulse)
            if self._ended.wait(self._interval_seconds):
                return


@dataclass(frozen=True)
class Hang:
    """A rank that stands still."""

    pulse: Pulse
    """Its last."""
    silent: bool
    """Whether it does not even speak."""
    seconds: float


@dataclass
class _Rank:
    pulse: Pulse
    heard_at: float
    moved_at: float


@dataclass
class HangWatch:
    """The judge of which ranks stand still. Pure: the clock is an argument of every method.

    Owns: the last pulse of each rank of the attempt. Concurrency: none; its owner locks.
    """

    limit_seconds: float
    _attempt: int = 0
    _ranks: dict[int, _Rank] = field(default_factory=dict)

    def begin(self, attempt: int) -> None:
        """Forget the ranks of earlier attempts."""
        self._attempt, self._ranks = attempt, {}

    def end(self) -> None:
        """Judge nobody until the next attempt begins."""
        self.begin(0)

    def hear(self, pulse: Pulse, now: float) -> None:
        """Note what a rank said; those of other attempts are not heard."""
        if pulse.attempt != self._attempt:
            return
        known = self._ranks.get(pulse.rank)
        moved = known is None or known.pulse.moves != pulse.moves
        self._ranks[pulse.rank] = _Rank(pulse, now, now if known is None or moved else known.moved_at)

    def ranks_on(self, node_id: str) -> list[int]:
        """Ranks of the attempt that have spoken from a node."""
        return sorted(number for number, rank in self._ranks.items() if rank.pulse.node_id == node_id)

    def pulse_of(self, rank: int) -> Pulse | None:
        """The last of a rank of the attempt; None if it has not spoken."""
        known = self._ranks.get(rank)
        return known.pulse if known else None

    def hangs(self, now: float) -> list[Hang]:
        """The ranks that hold up the others, by rank; empty while there is hope."""
        ranks = [self._ranks[number] for number in sorted(self._ranks)]
        silent = [rank for rank in ranks if now - rank.heard_at > self.limit_seconds]
        if silent:
            return [Hang(rank.pulse, silent=True, seconds=now - rank.heard_at) for rank in silent]
        fewest = min((rank.pulse.moves for rank in ranks), default=0)
        behind = [rank for rank in ranks if rank.pulse.moves == fewest]
        if any(now - rank.moved_at <= self.limit_seconds + rank.pulse.allowed_seconds for rank in behind):
            return []
        return [Hang(rank.pulse, silent=False, seconds=now - rank.moved_at) for rank in behind]


@dataclass(frozen=True)
class Examined:
    """What was found out about a process on its node."""

    state: str
    stacks: str
    """Of all its threads; empty where they could not be had."""


def examine_and_kill(pulse: Pulse) -> Examined:
    """Find out where a process stands, and kill it. Runs on its node.

    A process that was stopped continues for as long as it takes to write its stacks, which it does first.
    """
    try:
        process = pulse.process.process()
        if process is None:
            return Examined("dead" if pulse.process.has_ended() else "not to be seen from its node", "")
        status = process.status()
        process.send_signal(STACK_SIGNAL)
        if status == psutil.STATUS_STOPPED:
            process.send_signal(signal.SIGCONT)
        stacks = _await_stacks(Path(pulse.stack_path), DUMP_SECONDS, time.monotonic, time.sleep)
        process.kill()
    except psutil.NoSuchProcess:
        return Examined("dead", "")
    return Examined(_STATES.get(status, f"alive ({status})"), stacks)


def _await_stacks(path: Path, seconds: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> str:
    """The stacks, once a whole dump is there; what there is of it after `seconds`."""
    deadline, text = clock() + seconds, ""
    while clock() < deadline:
        before, text = text, path.read_text("utf-8") if path.exists() else ""
        if text and text == before:
            break
        sleep(0.1)
    return text


def training_stack(stacks: str) -> str:
    """Of a dump of all threads, that which trains; all of it where none does."""
    threads = re.split(r"\n(?=(?:Current thread|Thread) 0x)", stacks.strip())
    return next((thread for thread in threads if "rank/trainer.py" in thread and "watchdog.py" not in thread), stacks)


def innermost(stack: str) -> str:
    """The innermost line of a stack, without the folder: `distributed_c10d.py:3001 in all_reduce`."""
    found = re.search(r'File "([^"]+)", line (\d+) in (\S+)', stack)
    return f"{Path(found[1]).name}:{found[2]} in {found[3]}" if found else ""


def hang_text(hang: Hang, examined: Examined) -> str:
    """One line: which rank, where, since when, in what state and at which line."""
    pulse = hang.pulse
    what = "has not spoken" if hang.silent else f"has stood in phase {pulse.phase}"
    line = innermost(training_stack(examined.stacks))
    at = f", at {line}" if line else ""
    place = f"rank {pulse.rank} on {pulse.host} (pid {pulse.process.pid})"
    return f"{place} {what} for {hang.seconds:.0f} s; its process is {examined.state}{at}"


def examined_on_its_node(pulse: Pulse) -> Examined:
    """Examine and kill a rank's process by a Ray task on its node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(pulse.node_id, soft=False)
    task: Any = ray.remote(examine_and_kill)
    try:
        found: Examined = ray.get(
            task.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pulse), timeout=EXAMINE_SECONDS
        )
    except Exception as error:  # the node is gone, or cut off
        return Examined(f"unreachable ({type(error).__name__})", "")
    return found
