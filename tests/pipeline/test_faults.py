from __future__ import annotations

import errno

import aiohttp
import pytest
from botocore import exceptions as boto

from pipeline import faults
from pipeline.errors import StorageError


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def client_error(code: str, status: int) -> boto.ClientError:
    return boto.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


TRANSIENT = [
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError("slow"),
    boto.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
    boto.ReadTimeoutError(endpoint_url="http://127.0.0.1:1"),
    boto.ConnectionClosedError(endpoint_url="http://127.0.0.1:1"),
    aiohttp.ClientPayloadError("cut off"),
    client_error("SlowDown", 503),
    client_error("InternalError", 500),
    client_error("502", 502),
]
USERS = [
    (client_error("InvalidAccessKeyId", 403), "credentials"),
    (client_error("SignatureDoesNotMatch", 403), "credentials"),
    (client_error("AccessDenied", 403), "credentials"),
    (client_error("NoSuchBucket", 404), "bucket"),
    (boto.NoCredentialsError(), "credentials"),
    (OSError(errno.ENOSPC, "full"), "disk"),
    (PermissionError(errno.EACCES, "refused"), "folder"),
    (NotADirectoryError(errno.ENOTDIR, "a file"), "path"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_transient_faults_are_outlived(error: Exception) -> None:
    clock = Clock()
    outcomes = iter([error] * 8)

    def call() -> str:
        for outcome in outcomes:
            raise outcome
        return "done"

    assert faults.retry(call, "s3://b/k", 120, clock=clock, sleep=clock.sleep) == "done"


@pytest.mark.parametrize(("error", "field"), USERS, ids=repr)
def test_faults_of_the_user_are_told_at_once(error: Exception, field: str) -> None:
    clock = Clock()
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(StorageError) as caught:
        faults.retry(call, "s3://b/k", 120, clock=clock, sleep=clock.sleep)
    assert caught.value.field == field
    assert "s3://b/k" in str(caught.value)
    assert len(calls) == 1


def test_the_deadline_ends_the_attempts() -> None:
    clock = Clock()

    def call() -> None:
        clock.sleep(1)
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    with pytest.raises(StorageError, match="reachable"):
        faults.retry(call, "s3://b/k", 120, clock=clock, sleep=clock.sleep)
    assert 100 < clock.now <= 121


def test_a_server_that_stays_broken_ends_in_an_oserror_with_the_url() -> None:
    def call() -> None:
        raise client_error("InternalError", 500)

    with pytest.raises(OSError, match="InternalError") as caught:
        faults.retry(call, "s3://b/k", 0)
    assert caught.value.filename == "s3://b/k"


def test_a_missing_object_stays_a_filenotfounderror() -> None:
    def call() -> None:
        raise FileNotFoundError("k")

    with pytest.raises(FileNotFoundError) as caught:
        faults.retry(call, "s3://b/k", 120)
    assert caught.value.filename == "s3://b/k"


def test_waits_grow_and_stay_below_their_limit() -> None:
    clock = Clock()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock.sleep(seconds)

    def call() -> None:
        raise TimeoutError

    with pytest.raises(StorageError):
        faults.retry(call, "s3://b/k", 120, clock=clock, sleep=sleep, jitter=lambda: 1.0)
    assert waits == sorted(waits)
    assert waits[-1] == faults.LONGEST_WAIT_SECONDS
