from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import loader_faults
import psutil
import pytest

from pipeline.load.processes.fork_server import ForkServer


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


def forked(server: ForkServer, previous: int = 0) -> tuple[Connection, int, str]:
    ours, theirs = Pipe()
    with theirs:
        pid, ended = server.fork(theirs.fileno(), previous)
    return ours, pid, ended


def test_a_process_is_there_within_half_a_second_and_has_torch(server: ForkServer) -> None:
    line, first, _ = forked(server)
    began = time.monotonic()
    other, second, _ = forked(server)

    assert time.monotonic() - began < 0.5
    for pid in (first, second):
        assert any("libtorch" in region.path for region in psutil.Process(pid).memory_maps())
        assert psutil.Process(pid).num_threads() == 1
    line.close()
    other.close()


def test_a_line_ends_with_its_process_alone_and_the_next_one_hears_how(server: ForkServer) -> None:
    line, pid, _ = forked(server)
    other, other_pid, _ = forked(server)
    os.kill(pid, signal.SIGKILL)

    assert wait([line, other], 5) == [line]
    with pytest.raises((EOFError, OSError)):
        line.recv()
    again, _, ended = forked(server, pid)
    assert ended == "was killed by SIGKILL"
    assert loader_faults.is_gone(pid) and not loader_faults.is_gone(other_pid)
    other.close()
    again.close()


def test_a_process_ends_when_its_line_does(server: ForkServer) -> None:
    line, pid, _ = forked(server)
    line.close()
    deadline = time.monotonic() + 5
    while not loader_faults.is_gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_was_killed_says_so_and_takes_its_children_with_it() -> None:
    server = ForkServer()
    line, pid, _ = forked(server)
    (process,) = [child for child in loader_faults.servers() if pid in [item.pid for item in child.children()]]
    process.kill()

    assert wait([line], 5) == [line]
    with pytest.raises(OSError):
        forked(server)
    server.close()


def test_an_interrupt_from_the_terminal_does_not_reach_them(server: ForkServer) -> None:
    line, pid, _ = forked(server)

    assert os.getsid(pid) != os.getsid(0)
    line.close()
