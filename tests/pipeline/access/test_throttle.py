from __future__ import annotations

import random
import threading
import time

import pytest
from botocore import exceptions as boto

from pipeline.access.retry import retry
from pipeline.access.throttle import CUT_SECONDS, Throttle


class BusyStore:
    """Answers SlowDown until `ready_at`, and counts what it is asked."""

    def __init__(self, seconds: float) -> None:
        self.requests = 0
        self.most_at_once = 0
        self._at_once = 0
        self._ready_at = time.monotonic() + seconds
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.requests += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(0.002)
        with self._lock:
            self._at_once -= 1
        if time.monotonic() < self._ready_at:
            answer = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}
            raise boto.ClientError(answer, "GetObject")


def read_in_threads(store: BusyStore, throttle: Throttle | None, threads: int) -> None:
    jitter = random.Random(0).random
    readers = [
        threading.Thread(target=lambda: retry(store, "s3://b/k", 60, throttle=throttle, jitter=jitter))
        for _ in range(threads)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


def test_a_busy_store_is_asked_less_than_by_threads_that_back_off_each_on_its_own() -> None:
    alone, shared = BusyStore(0.8), BusyStore(0.8)

    read_in_threads(alone, None, threads=32)
    read_in_threads(shared, throttle := Throttle(64), threads=32)

    assert shared.requests < 0.8 * alone.requests
    assert throttle.limit > 1


def test_refusals_halve_the_turns_down_to_one_and_answers_raise_them_again() -> None:
    now = 0.0
    throttle = Throttle(8, clock=lambda: now)
    limits = []
    for _ in range(5):
        now += CUT_SECONDS
        with throttle.turn():
            throttle.refused()
        limits.append(throttle.limit)
    assert limits == [1.0] * 5

    for _ in range(60):
        with throttle.turn():
            throttle.answered()
    assert throttle.limit == 8


def test_refusals_of_one_moment_count_once() -> None:
    now = 0.0
    throttle = Throttle(8, clock=lambda: now)
    turns = [throttle.turn() for _ in range(8)]
    for turn in turns:
        turn.__enter__()

    for _ in turns:
        throttle.refused()
    assert throttle.limit == 4
    now += CUT_SECONDS
    throttle.refused()

    assert throttle.limit == 2
    for turn in turns:
        turn.__exit__(None, None, None)


def test_no_more_requests_are_under_way_than_are_allowed() -> None:
    store = BusyStore(0)

    read_in_threads(store, Throttle(3), threads=20)

    assert store.most_at_once == 3


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError()])
def test_a_store_that_is_unreachable_is_not_a_busy_one(error: Exception) -> None:
    throttle = Throttle(8)
    outcomes = iter([error])

    def call() -> None:
        for outcome in outcomes:
            raise outcome

    retry(call, "s3://b/k", 60, throttle=throttle)

    assert throttle.limit == 8
