"""Which ranks hold up the others, and what is found out about their processes; a whole run is in test_hangs."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import wait_until

from jobs.rank.watchdog import (
    Examined,
    Hang,
    HangWatch,
    Pulse,
    RankPulse,
    examine_and_kill,
    hang_text,
    innermost,
    training_stack,
)
from pipeline.host.process_identity import ProcessIdentity

LIMIT = 10.0

SCRIPT = """
import sys, threading, time
sys.path[:0] = {path!r}
from jobs.rank.watchdog import RankPulse

class Monitor:
    class pulse:
        @staticmethod
        def remote(pulse):
            print(pulse.stack_path, flush=True)
            told.set()

told = threading.Event()

RankPulse(Monitor, attempt=1, rank=3, node_id="n", limit_seconds=1.0)

def inner_most_of_all():
    print("hangs", flush=True)
    {hang}

told.wait()
inner_most_of_all()
"""


def pulse(rank: int, moves: int, phase: str = "step", allowed: float = 0.0, attempt: int = 1) -> Pulse:
    return Pulse(attempt, rank, "node-1", "n", ProcessIdentity(100 + rank), "", phase, moves, allowed)


def watched(*pulses: tuple[float, Pulse]) -> HangWatch:
    """A watch that heard these, each at its time."""
    watch = HangWatch(LIMIT)
    watch.begin(1)
    for now, heard in pulses:
        watch.hear(heard, now)
    return watch


def blamed(watch: HangWatch, now: float) -> list[tuple[int, bool, float]]:
    return [(hang.pulse.rank, hang.silent, hang.seconds) for hang in watch.hangs(now)]


def test_ranks_that_move_are_left_alone() -> None:
    watch = watched(*[(float(now), pulse(rank, moves=now)) for now in range(100) for rank in range(3)])

    assert blamed(watch, 100.0) == []


def test_a_rank_that_does_not_speak_is_blamed_and_not_those_that_wait_for_it() -> None:
    speaking = [(float(now), pulse(rank, moves=7)) for now in range(31) for rank in (0, 2)]
    watch = watched((20.0, pulse(1, moves=7)), *speaking)

    assert blamed(watch, 30.0) == []
    assert blamed(watch, 31.0) == [(1, True, 11.0)]


def test_the_rank_that_is_furthest_behind_is_blamed() -> None:
    """Ranks 0 and 2 wait in the reduction for rank 1, which is not there yet."""
    watch = watched(*[(float(now), pulse(rank, moves=7 if rank == 1 else 8)) for now in range(31) for rank in range(3)])

    assert blamed(watch, 31.0) == [(1, False, 31.0)]


def test_all_are_blamed_for_a_collective_in_which_all_hang() -> None:
    watch = watched(*[(float(now), pulse(rank, moves=7)) for now in range(31) for rank in range(2)])

    assert blamed(watch, 31.0) == [(0, False, 31.0), (1, False, 31.0)]


def test_a_phase_that_may_take_long_takes_long() -> None:
    """Rank 1 waits for storage, and rank 0 for rank 1."""
    heard = [
        (float(now), pulse(rank, moves=7 + (rank == 0), phase="data", allowed=300.0 if rank == 1 else 0.0))
        for now in range(400)
        for rank in range(2)
    ]

    assert blamed(watched(*heard[:600]), 300.0) == []
    assert blamed(watched(*heard), 399.0) == [(1, False, 399.0)]


def test_other_attempts_are_not_heard() -> None:
    watch = watched((0.0, pulse(0, moves=1)), (0.0, pulse(5, moves=1, attempt=2)))
    watch.begin(2)
    watch.hear(pulse(0, moves=1), 1.0)

    assert blamed(watch, 100.0) == []


@pytest.fixture
def hung(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], Pulse]]:
    """A rank's process that hangs as the parameter says."""
    script = SCRIPT.format(path=sys.path, hang=request.param)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    path = process.stdout.readline().strip()
    while process.stdout.readline() != "hangs\n":
        pass  # another pulse
    yield process, Pulse(1, 3, "node-1", "n", ProcessIdentity.of(process.pid), path, "step", 7, 0.0)
    process.kill()
    process.wait()


SLEEPS = "time.sleep(60)"
HOLDS_THE_LOCK = "sum(range(10**12))"


@pytest.mark.parametrize("hung", [SLEEPS], indirect=True)
def test_a_stopped_process_tells_its_stack_and_is_killed(hung: tuple[subprocess.Popen[str], Pulse]) -> None:
    process, last = hung
    os.kill(process.pid, signal.SIGSTOP)
    wait_until("the stop", lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, 10)

    found = examine_and_kill(last)

    assert found.state == "stopped (T), as by SIGSTOP"
    assert "in inner_most_of_all" in found.stacks
    assert process.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize("hung", [HOLDS_THE_LOCK], indirect=True)
def test_a_process_that_holds_the_interpreters_lock_tells_its_stack(hung: tuple[subprocess.Popen[str], Pulse]) -> None:
    process, last = hung

    found = examine_and_kill(last)

    assert found.state.startswith("alive")
    assert "in inner_most_of_all" in found.stacks
    assert process.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize("hung", [SLEEPS], indirect=True)
def test_another_process_with_the_same_number_is_not_touched(hung: tuple[subprocess.Popen[str], Pulse]) -> None:
    process, last = hung

    earlier = dataclasses.replace(last.process, started=last.process.started - 1)
    elsewhere = dataclasses.replace(last.process, namespace="of another container")

    assert examine_and_kill(dataclasses.replace(last, process=earlier)) == Examined("dead", "")
    assert examine_and_kill(dataclasses.replace(last, process=elsewhere)).state == "not to be seen from its node"
    assert process.poll() is None


class Monitor:
    """Stands for the actor: keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[Pulse] = []
        outer = self

        class Method:
            @staticmethod
            def remote(told: Pulse) -> None:
                outer.heard.append(told)

        self.pulse = Method


def test_a_rank_tells_how_far_it_is_and_leaves_nothing_behind() -> None:
    monitor: Any = Monitor()
    rank = RankPulse(monitor, attempt=2, rank=1, node_id="n", limit_seconds=1.0)
    wait_until("a pulse", lambda: bool(monitor.heard), 10)
    rank.at("data", 300.0)
    rank.at("step")
    wait_until("another", lambda: monitor.heard[-1].phase == "step", 10)

    first, last = monitor.heard[0], monitor.heard[-1]
    assert (first.phase, first.moves, first.attempt, first.rank, first.process.pid) == ("start", 0, 2, 1, os.getpid())
    assert (last.moves, last.allowed_seconds) == (2, 0.0)
    assert Path(last.stack_path).exists()
    rank.close()
    count = len(monitor.heard)
    time.sleep(0.7)
    assert len(monitor.heard) <= count + 1
    assert not Path(last.stack_path).parent.exists()


DUMP = """Thread 0x00007f01 (most recent call first):
  File "/x/threading.py", line 320 in wait
  File "/x/jobs/rank/watchdog.py", line 117 in _beat

Thread 0x00007f02 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 3001 in all_reduce
  File "/x/jobs/rank/trainer.py", line 340 in _backward
  File "/x/jobs/rank/trainer.py", line 130 in run

Current thread 0x00007f03 (most recent call first):
  File "/x/ray/_private/workers/default_worker.py", line 321 in <module>
"""


def test_the_training_threads_line_is_what_is_told() -> None:
    assert training_stack(DUMP).splitlines()[1].endswith("line 3001 in all_reduce")
    assert "0x00007f03" not in training_stack(DUMP)
    assert innermost(training_stack(DUMP)) == "distributed_c10d.py:3001 in all_reduce"
    assert training_stack("no such thread") == "no such thread"
    silent = Hang(pulse(1, moves=7), silent=True, seconds=12.3)
    assert hang_text(silent, Examined("stopped (T), as by SIGSTOP", DUMP)) == (
        "rank 1 on node-1 (pid 101) has not spoken for 12 s; its process is stopped (T), as by SIGSTOP, "
        "at distributed_c10d.py:3001 in all_reduce"
    )
    standing = dataclasses.replace(silent, silent=False)
    assert "has stood in phase step for 12 s; its process is dead" in hang_text(standing, Examined("dead", ""))
