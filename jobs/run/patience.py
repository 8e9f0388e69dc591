"""Waiting, when a driver starts, for what is briefly unavailable: a port, the cluster, the last driver's monitor.

A person who typed a command gets the error at once. A driver that was restarted has the patience of the run, since what
it waits for often disappeared with the previous driver.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 1.0


def persevere(
    attempt: Callable[[], T],
    passes: type[Exception] | tuple[type[Exception], ...],
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until it returns; logs what it waits for, and when that is over.

    Args:
        attempt: What to do; must be safe to repeat.
        passes: What it raises while another try is worthwhile.
        seconds: No further attempt starts later than this; 0 for a single one.
        clock: Monotonic seconds.
        sleep: Waits that many seconds.

    Raises:
        Exception: What the last attempt raised.
    """
    began = clock()
    is_logged = False
    while True:
        try:
            result = attempt()
        except passes as error:
            if clock() - began + POLL_SECONDS > seconds:
                raise
            if not is_logged:
                logger.warning("waits up to %.0f s: %s", seconds, error)
                is_logged = True
            sleep(POLL_SECONDS)
        else:
            if is_logged:
                logger.warning("waited %.0f s; continuing", clock() - began)
            return result
