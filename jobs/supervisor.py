"""What a submitted job runs: the driver as a child process, started again when it is killed.

A driver that ends by itself, well or badly, is the end of the job. One that dies by a signal nobody asked for (the
out-of-memory killer, `kill -9`) is started again and resumes from the newest checkpoint.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from jobs.launcher import module_command

QUICK_DEATH_SECONDS = 60.0
MAX_QUICK_DEATHS = 3
# Ray frees the name and the workers of a dead driver while the next one imports.
PAUSE_SECONDS = 1.0


def supervise(command: Sequence[str]) -> int:
    """Run `command` until it ends by itself; returns its exit code."""
    quick_deaths = 0
    stop_asked = False
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal stop_asked
        stop_asked = True
        if child is not None:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    while not stop_asked:
        started = time.monotonic()
        child = subprocess.Popen(command)
        if stop_asked:  # the signal came while the child was being started
            child.terminate()
        code = child.wait()
        if code >= 0 or stop_asked:
            return code if code >= 0 else 1
        quick_deaths = quick_deaths + 1 if time.monotonic() - started < QUICK_DEATH_SECONDS else 1
        if quick_deaths > MAX_QUICK_DEATHS:
            return 1
        name = signal.Signals(-code).name
        sys.stderr.write(f"the driver was killed ({name}); starting it again\n")
        sys.stderr.flush()
        time.sleep(PAUSE_SECONDS)
    return 1


if __name__ == "__main__":
    sys.exit(supervise(module_command(sys.executable, "jobs.cli", "drive", *sys.argv[1:])))
