from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial

import pytest

from pipeline.host.daemon_threads import DaemonThreads

HANGING = """
import threading
from pipeline.host import daemon_threads
daemon_threads.SHUTDOWN_SECONDS = 0.1
threads = daemon_threads.DaemonThreads(2, "test")
threads.submit(threading.Event().wait)
threads.shutdown()
"""


def test_results_and_errors_come_back() -> None:
    threads = DaemonThreads(3, "test")

    assert [future.result() for future in [threads.submit(pow, n, 2) for n in range(50)]] == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result()
    threads.shutdown()


def test_calls_without_a_result_run_in_their_turn() -> None:
    threads, ran = DaemonThreads(1, "test"), []
    for number in range(5):
        threads.start(partial(ran.append, number))
    threads.submit(ran.append, 5).result()
    threads.shutdown()

    assert ran == [0, 1, 2, 3, 4, 5]


def test_what_did_not_start_is_cancelled_and_the_rest_finishes() -> None:
    threads = DaemonThreads(1, "test")
    started, go = threading.Event(), threading.Event()

    def work() -> int:
        started.set()
        go.wait()
        return 1

    running = threads.submit(work)
    waiting = threads.submit(work)
    started.wait()

    threads.shutdown(wait=False, cancel_futures=True)
    go.set()

    assert running.result() == 1
    assert waiting.cancelled()


def test_the_interpreter_exits_while_a_thread_hangs() -> None:
    subprocess.run([sys.executable, "-c", HANGING], check=True, timeout=60)
