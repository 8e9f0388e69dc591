"""What a submitted job runs: the driver as a child process, started again when it is killed.

A driver that ends by itself, well or badly, is the end of the job. One that dies by a signal nobody asked for (the
out-of-memory killer, `kill -9`) is started again and resumes from the newest checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from jobs.cluster.job_store import received
from jobs.errors import ClusterError
from jobs.run.own_code import module_command

QUICK_DEATH_SECONDS = 60.0
MAX_QUICK_DEATHS = 3
# Ray frees the name and the workers of a dead driver while the next one imports.
PAUSE_SECONDS = 1.0


def supervise(
    command: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    quick_death_seconds: float = QUICK_DEATH_SECONDS,
    pause_seconds: float = PAUSE_SECONDS,
) -> int:
    """Run `command` until it ends by itself; returns its exit code.

    Args:
        command: Of the driver.
        environ: Its environment; None: that of this process.
        quick_death_seconds: A driver that is killed earlier counts as one that cannot start.
        pause_seconds: Before the next is started.
    """
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
        child = subprocess.Popen(command, env=environ)
        if stop_asked:  # the signal came while the child was being started
            child.terminate()
        code = child.wait()
        if code >= 0 or stop_asked:
            return code if code >= 0 else 1
        quick_deaths = quick_deaths + 1 if time.monotonic() - started < quick_death_seconds else 1
        if quick_deaths > MAX_QUICK_DEATHS:
            return 1
        _report_death(signal.Signals(-code).name)
        time.sleep(pause_seconds)
    return 1


def _report_death(signal_name: str) -> None:
    sys.stderr.write(f"the driver was killed ({signal_name}); starting it again\n")
    sys.stderr.flush()


def drive(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Supervise the driver of a run, and note in the run's directory an end that no driver could note itself.

    Args:
        arguments: URL of the run's directory, and options of the driver.
        environ: Of the job.
    """
    try:
        environ = received(environ)
    except ClusterError as error:
        sys.stderr.write(f"failed: {error}\n")
        return 1
    began = time.time()
    code = supervise(module_command(sys.executable, "jobs.cli.main", "drive", *arguments), environ)
    if code:  # imported only now: until then nothing here can fail or be large
        from jobs.cluster.session import Session
        from jobs.control.unreported_end import note_end

        run = Session.open(environ).run(arguments[0])
        reason = f"its driver ended before the run began; `convmae logs {run.name}` has what it printed"
        note_end(run, began, reason, environ)
    return code


if __name__ == "__main__":
    sys.exit(drive(sys.argv[1:], os.environ))
