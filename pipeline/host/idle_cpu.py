"""Work that takes only the CPU time which nothing else on the machine wants."""

from __future__ import annotations

import contextlib
import os

LEAST_PRIORITY = 19


def take_idle_cpu() -> None:
    """Give this thread, and those that it starts from now on, the lowest priority.

    Linux's idle class gives a busy core's thread 3 shares beside the 1,024 of an ordinary one, and a nice value of 19
    gives it 15. It cannot be taken back without privileges, so call it in a process that does nothing else.
    """
    with contextlib.suppress(OSError):  # a nice value cannot be refused, but there are odd kernels
        os.setpriority(os.PRIO_PROCESS, 0, LEAST_PRIORITY)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
