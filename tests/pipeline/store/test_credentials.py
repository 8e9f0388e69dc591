"""Credentials that are late, that rotate, or that are refused once, from every place where they may come from."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from guarded_s3 import GuardedS3, Principal
from metadata_server import HOUR, ROLE, MetadataServer

from pipeline.access.s3_options import OBSTORE, S3Options
from pipeline.errors import CredentialsError
from pipeline.store import lease, parted_write
from pipeline.store.file_systems import RENEW_SECONDS
from pipeline.store.storage import CHECK_SECONDS, Storage

URL = "s3://bucket/x"


@pytest.fixture(scope="module")
def server(open_s3: Storage) -> Storage:
    """An S3 server with one bucket, that holds one object."""
    open_s3.write(URL, b"data")
    return open_s3


@pytest.fixture
def guard(server: Storage) -> Iterator[GuardedS3]:
    with GuardedS3(server).running() as guard:
        yield guard


@pytest.fixture
def cloud() -> Iterator[MetadataServer]:
    with MetadataServer().running() as cloud:
        yield cloud


@pytest.fixture
def instance(guard: GuardedS3, cloud: MetadataServer, monkeypatch: pytest.MonkeyPatch, reader: str) -> Storage:
    """Access of a process on an instance of the cloud, which was given only the address."""
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    return Storage(guard.endpoint, region="us-east-1", retry_seconds=30, s3=S3Options(reader=reader))


@pytest.mark.parametrize("place", ["instance", "container"])
def test_credentials_that_come_late_are_waited_for(
    instance: Storage, guard: GuardedS3, cloud: MetadataServer, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "container":
        for name, value in cloud.container_environment().items():
            monkeypatch.setenv(name, value)
    late = threading.Timer(2.5, cloud.rotate, [guard])
    late.start()

    assert instance.read(URL) == b"data"
    assert [seen.refused for seen in guard.seen] == [""]
    late.join()


def test_a_service_that_answers_late_is_asked_again(instance: Storage, guard: GuardedS3, cloud: MetadataServer) -> None:
    cloud.rotate(guard)
    cloud.late_seconds = 1.5  # botocore waits for a second
    threading.Timer(4, setattr, [cloud, "late_seconds", 0.0]).start()

    assert instance.read(URL) == b"data"
    assert len(guard.seen) == 1


@pytest.mark.parametrize("refusal", ["InvalidAccessKeyId", "ExpiredToken", "AccessDenied"])
def test_keys_that_rotate_before_they_expire_are_fetched_again(
    instance: Storage, guard: GuardedS3, cloud: MetadataServer, refusal: str
) -> None:
    cloud.rotate(guard)
    assert instance.read(URL) == b"data"
    for call in (lambda: instance.read(URL), lambda: instance.exists(URL), lambda: instance.list_names("s3://bucket")):
        new = cloud.rotate(guard, refusal=refusal)
        assert call()
        assert (guard.seen[-1].key_id, guard.seen[-1].refused) == (new.key_id, "")


def test_keys_that_expire_are_renewed_before_and_nothing_is_refused(
    instance: Storage, guard: GuardedS3, cloud: MetadataServer, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    for name, value in cloud.container_environment().items():  # an instance's keys are used longer than they say
        monkeypatch.setenv(name, value)
    cloud.rotate(guard, lasts_seconds=HOUR / 4 + 4)  # botocore renews a quarter of an hour before
    assert instance.read(URL) == b"data"
    new = cloud.rotate(guard, refusal="")
    time.sleep(5)

    assert instance.read(URL) == b"data"
    assert guard.seen[-1].key_id == new.key_id
    assert not any(seen.refused for seen in guard.seen)
    assert guard.seen[-1].headers["user-agent"].startswith("object_store") == (reader == OBSTORE)


def test_many_threads_that_are_refused_at_once_ask_the_service_seldom(
    instance: Storage, guard: GuardedS3, cloud: MetadataServer
) -> None:
    cloud.rotate(guard)
    instance.read(URL)
    time.sleep(1)
    before = cloud.asked.count(ROLE)
    cloud.rotate(guard)
    began = time.monotonic()

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(instance.read, [URL] * 64)) == [b"data"] * 64

    seconds = time.monotonic() - began
    asked = cloud.asked.count(ROLE) - before
    assert 1 <= asked <= 2 + seconds / RENEW_SECONDS, "32 threads are refused at once, and one renewal has to do"


def test_a_token_that_was_given_and_expired_gives_way_to_what_the_machine_has(
    instance: Storage, guard: GuardedS3, cloud: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(instance, key="ASIAGIVEN", secret="theirs", token="given")
    guard.principals["ASIAGIVEN"] = Principal("given")
    for name, value in (("KEY_ID", given.key), ("SECRET", given.secret), ("TOKEN", given.token)):
        variable = {"KEY_ID": "AWS_ACCESS_KEY_ID", "SECRET": "AWS_SECRET_ACCESS_KEY", "TOKEN": "AWS_SESSION_TOKEN"}
        monkeypatch.setenv(variable[name], str(value))  # the environment of a process stays as it is
    assert given.read(URL) == b"data"
    assert guard.seen[-1].key_id == "ASIAGIVEN"

    own = cloud.rotate(guard, refusal="ExpiredToken")

    assert given.read(URL) == b"data"
    assert guard.seen[-1].key_id == own.key_id


def test_a_profile_file_that_is_rewritten_is_read_again(
    instance: Storage, guard: GuardedS3, cloud: MetadataServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def write(key_id: str, token: str) -> None:
        lines = ("[default]", f"aws_access_key_id={key_id}", "aws_secret_access_key=theirs")
        file.write_text("\n".join([*lines, f"aws_session_token={token}"]))

    for _ in range(2):
        issued = cloud.rotate(guard, refusal="ExpiredToken")
        write(issued.key_id, issued.token)
        assert instance.read(URL) == b"data"


def test_keys_without_a_token_are_kept_and_asked_with_again(
    instance: Storage, guard: GuardedS3, cloud: MetadataServer
) -> None:
    cloud.rotate(guard)
    fixed = replace(instance, key="AKIAFIXED", secret="theirs")
    threading.Timer(2, guard.principals.__setitem__, ["AKIAFIXED", Principal()]).start()

    assert fixed.read(URL) == b"data"
    assert {seen.key_id for seen in guard.seen} == {"AKIAFIXED"}


def test_a_token_file_that_is_missing_is_no_object_that_is_missing(
    instance: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that took it for that would begin again at its first step."""
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "not-there-yet"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/nodes")
    hasty = replace(instance, retry_seconds=0.5)

    for call in (hasty.exists, hasty.list_names, hasty.list_files, hasty.read, hasty.etag):
        with pytest.raises(CredentialsError, match="not-there-yet"):
            call(URL)


@pytest.mark.parametrize("write", [False, True])
def test_before_anything_starts_missing_credentials_are_reported_within_seconds(instance: Storage, write: bool) -> None:
    began = time.monotonic()
    with pytest.raises(CredentialsError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine"):
        replace(instance, retry_seconds=120).check("s3://bucket/folder", write=write)
    assert time.monotonic() - began < CHECK_SECONDS + 17


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conditional_write_that_met_another_is_made_again(
    instance: Storage, guard: GuardedS3, cloud: MetadataServer, code: str, tmp_path: Path
) -> None:
    """409 says nothing of what lies there: AWS asks to try again."""
    cloud.rotate(guard)
    left: list[tuple[int, str]] = []
    writes = ("PutObject", "CompleteMultipartUpload")
    guard.meddle = lambda call, headers: left.pop() if left and call.operation in writes else None
    url = f"s3://bucket/{tmp_path.name}"

    left[:] = [(409, code)] * 2
    assert instance.create(f"{url}/new", b"mine") and instance.read(f"{url}/new") == b"mine"
    left[:] = [(409, code)] * 2
    assert not instance.create(f"{url}/new", b"theirs")
    left[:] = [(409, code)] * 2
    assert instance.replace(f"{url}/new", b"mine too", b"mine")
    left[:] = [(409, code)] * 2
    with lease.hold_lease(instance, f"{url}/claims", "x", on_wait=pytest.fail) as held:
        assert held.number == 1
    left[:] = [(409, code)] * 2
    target = parted_write.begin(instance, f"{url}/parts")
    parted_write.finish(instance, target, [parted_write.write_part(instance, target, 1, 0, b"whole")])
    assert instance.read(f"{url}/parts") == b"whole"
    assert not left
