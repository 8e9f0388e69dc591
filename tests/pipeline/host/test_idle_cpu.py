from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOLD = """
import os, threading
from pipeline.host.idle_cpu import take_idle_cpu
take_idle_cpu()
told = lambda: print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.getpriority(os.PRIO_PROCESS, 0), flush=True)
told()
thread = threading.Thread(target=told)
thread.start(); thread.join()
"""


def test_a_thread_and_those_that_it_starts_take_only_what_is_left() -> None:
    ended = subprocess.run([sys.executable, "-c", TOLD], capture_output=True, text=True, check=True, cwd=Path.cwd())

    assert ended.stdout == "True 19\nTrue 19\n"
