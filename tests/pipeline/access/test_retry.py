"""Attempts at a call, and how their faults are sorted (pipeline.access.faults)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import aiohttp
import pytest
from botocore import exceptions as boto

from pipeline.access.retry import LONGEST_WAIT_SECONDS, retry
from pipeline.errors import CredentialsError, RefusedError, StorageError


class Clock:
    """Time that passes only in sleep."""

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
    client_error("ConditionalRequestConflict", 409),
    client_error("OperationAborted", 409),
]
REFUSALS = [
    client_error("InvalidAccessKeyId", 403),
    client_error("SignatureDoesNotMatch", 403),
    client_error("AccessDenied", 403),
    client_error("ExpiredToken", 400),
    client_error("403", 403),
    client_error("400", 400),  # what a HEAD with an expired token gets
    boto.NoCredentialsError(),
    boto.CredentialRetrievalError(provider="iam-role", error_msg="late"),
]
USERS = [
    (client_error("NoSuchBucket", 404), "bucket"),
    (OSError(errno.ENOSPC, "full"), "disk"),
    (PermissionError(errno.EACCES, "refused"), "folder"),
    (NotADirectoryError(errno.ENOTDIR, "a file"), "path"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_transient_faults_are_survived(error: Exception) -> None:
    clock = Clock()
    outcomes = iter([error] * 8)

    def call() -> str:
        for outcome in outcomes:
            raise outcome
        return "done"

    assert retry(call, "s3://b/k", 120, clock=clock, sleep=clock.sleep) == "done"


@pytest.mark.parametrize(("error", "field"), USERS, ids=repr)
def test_faults_of_the_user_are_reported_at_once(error: Exception, field: str) -> None:
    clock = Clock()
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(StorageError) as caught:
        retry(call, "s3://b/k", 120, clock=clock, sleep=clock.sleep)
    assert caught.value.field == field
    assert "s3://b/k" in str(caught.value)
    assert len(calls) == 1


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_refused_credentials_are_renewed_before_each_further_attempt_until_the_deadline(error: Exception) -> None:
    clock, calls = Clock(), []

    def call() -> str:
        calls.append("call")
        if clock.now < 60:
            raise error
        return "done"

    def renew() -> None:
        calls.append("renew")

    assert retry(call, "s3://b/k", 120, renew=renew, clock=clock, sleep=clock.sleep) == "done"
    assert calls == ["call", "renew"] * (len(calls) // 2) + ["call"]
    with pytest.raises(CredentialsError, match="s3://b/k"):
        retry(raising(error), "s3://b/k", 20, clock=clock, sleep=clock.sleep)


def test_a_web_servers_refusal_is_reported_at_once() -> None:
    error = aiohttp.ClientResponseError(request_info=None, history=(), status=403)  # type: ignore[arg-type]

    with pytest.raises(RefusedError, match="403"):
        retry(raising(error), "https://host/x", 120, sleep=lambda seconds: pytest.fail("it waited"))


def test_transient_faults_renew_nothing() -> None:
    outcomes = iter([TimeoutError("slow")])

    def call() -> str:
        for outcome in outcomes:
            raise outcome
        return "done"

    assert retry(call, "s3://b/k", 9, renew=lambda: pytest.fail("renewed"), sleep=lambda _: None) == "done"


def test_the_operation_that_was_refused_is_named() -> None:
    error = boto.ClientError(
        {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "DeleteObject"
    )

    with pytest.raises(CredentialsError, match="DeleteObject"):
        retry(raising(error), "s3://b/k", 0)


def raising(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def test_the_deadline_ends_the_attempts() -> None:
    clock = Clock()

    def call() -> None:
        clock.sleep(1)
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    with pytest.raises(StorageError, match="reachable"):
        retry(call, "s3://b/k", 120, clock=clock, sleep=clock.sleep)
    assert 100 < clock.now <= 121


def test_a_server_that_stays_broken_ends_in_an_oserror_with_the_url() -> None:
    def call() -> None:
        raise client_error("InternalError", 500)

    with pytest.raises(OSError, match="InternalError") as caught:
        retry(call, "s3://b/k", 0)
    assert caught.value.filename == "s3://b/k"


def test_a_missing_object_stays_a_filenotfounderror() -> None:
    def call() -> None:
        raise FileNotFoundError("k")

    with pytest.raises(FileNotFoundError) as caught:
        retry(call, "s3://b/k", 120)
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
        retry(call, "s3://b/k", 120, clock=clock, sleep=sleep, jitter=lambda: 1.0)
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_SECONDS
