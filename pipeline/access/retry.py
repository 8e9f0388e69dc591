"""Attempts at a call to a store, repeated with backoff for as long as another one may succeed.

s3fs by itself gives up after about two seconds. Hand-written, since a library of retries (tenacity, backoff) would only
spare the loop: which faults are transient, renewing credentials between attempts, and the throttle are ours.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from pipeline.access import faults
from pipeline.access.throttle import Throttle

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 10.0
QUIET_SECONDS = 5.0
"""A fault that passes within this is not worth a warning."""


def retry(
    call: Callable[[], T],
    url: str,
    deadline_seconds: float,
    *,
    throttle: Throttle | None = None,
    renew: Callable[[], None] = lambda: None,
    origins: Mapping[str, str] = MappingProxyType({}),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    jitter: Callable[[], float] = random.random,
) -> T:
    """Call until it succeeds, fails permanently, or the deadline passes; full-jitter backoff in between.

    Args:
        call: What to do; must be safe to repeat.
        url: What it is done to, for the messages.
        deadline_seconds: No further attempt starts later than this; an attempt in progress is not cut short.
        throttle: Turns that threads share; None where any number may be under way.
        renew: Called before the next attempt where credentials were missing or refused.
        origins: Where the endpoint and the credentials come from, for the messages.
        clock: Monotonic seconds.
        sleep: Waits that many seconds.
        jitter: Draws from [0, 1).

    Raises:
        FileNotFoundError: Nothing lies at the URL.
        StorageError: The user can fix it.
        OSError: Anything else, with the URL as its filename.

    Long by its arguments alone.

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    began = clock()
    for attempt in itertools.count():
        try:
            return _in_turn(call, throttle) if throttle else call()
        except Exception as caught:
            error = faults.underlying(caught)
            wait_seconds = jitter() * min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**attempt)
            refused = faults.is_refused(error, url)
            if not (refused or faults.is_transient(error)) or clock() + wait_seconds > began + deadline_seconds:
                raise faults.translated(error, url, origins) from error
            level = logging.WARNING if clock() - began > QUIET_SECONDS else logging.DEBUG
            logger.log(
                level,
                "%s: attempt %d failed (%s), next in %.1f s",
                url,
                attempt + 1,
                faults.described(error),
                wait_seconds,
            )
            sleep(wait_seconds)
            if refused:
                renew()
    raise AssertionError("itertools.count() does not end")


def _in_turn(call: Callable[[], T], throttle: Throttle) -> T:
    with throttle.turn():
        try:
            result = call()
        except Exception as error:
            if faults.is_busy(error):
                throttle.refused()
            raise
        throttle.answered()
        return result
