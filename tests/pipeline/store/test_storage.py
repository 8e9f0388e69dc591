from __future__ import annotations

import errno
import os
import pickle
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipeline.access.places import normal
from pipeline.access.s3_options import OBSTORE, S3FS, S3Options
from pipeline.errors import StorageError
from pipeline.store.storage import Storage

BUCKET = "bucket"
ALLOW_ALL = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}'


@pytest.fixture(scope="module")
def guarded() -> Iterator[Storage]:
    """An S3 server with one bucket, which checks keys and secrets."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    root = {
        "endpoint_url": endpoint,
        "region_name": "us-east-1",
        "aws_access_key_id": "root",
        "aws_secret_access_key": "root",
    }
    boto3.client("s3", **root).create_bucket(Bucket=BUCKET)
    iam = boto3.client("iam", **root)
    iam.create_user(UserName="user")
    key = iam.create_access_key(UserName="user")["AccessKey"]
    iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=ALLOW_ALL)
    _let_unchecked(endpoint, "0")
    yield Storage(endpoint, key["AccessKeyId"], key["SecretAccessKey"], region="us-east-1", retry_seconds=20)
    _let_unchecked(endpoint, "inf")
    server.stop()


@pytest.fixture(scope="module")
def s3(guarded: Storage, reader: str) -> Storage:
    """The same by each reader of bodies."""
    return replace(guarded, s3=S3Options(reader=reader))


def _let_unchecked(endpoint: str, requests: str) -> None:
    """How many requests moto lets through before it checks keys."""
    body, plain = requests.encode(), {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset-auth", body, plain)).close()


@pytest.fixture(params=["local", "file", "memory", S3FS, OBSTORE])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    """A Storage and an empty folder on it."""
    if request.param in (S3FS, OBSTORE):
        storage = replace(request.getfixturevalue("guarded"), s3=S3Options(reader=request.param))
        return storage, f"s3://{BUCKET}/{tmp_path.name}"
    urls = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}
    return Storage(), urls[request.param]


def test_what_is_written_can_be_read_listed_and_deleted(place: tuple[Storage, str], tmp_path: Path) -> None:
    storage, folder = place
    data = os.urandom(1000)
    (tmp_path / "local-file").write_bytes(data)
    url = storage.join(folder, "d", "x")

    storage.write(url, data)
    storage.write(storage.join(folder, "d", "empty"), b"")
    storage.upload(tmp_path / "local-file", storage.join(folder, "d", "e", "y"))
    storage.download(storage.join(folder, "d", "e", "y"), tmp_path / "copy")

    assert storage.read(url) == data
    assert storage.read(storage.join(folder, "d", "empty")) == b""
    assert storage.read_range(url, 10, 5) == data[10:15]
    assert storage.read_range(url, 990, 50) == data[990:]
    assert storage.read_range(url, 5000, 50) == b""
    assert storage.size(url) == 1000
    assert (tmp_path / "copy").read_bytes() == data
    assert storage.list_names(storage.join(folder, "d")) == ["e", "empty", "x"]
    assert storage.list_files(storage.join(folder, "d")) == {"e/y": 1000, "empty": 0, "x": 1000}
    storage.delete(url)
    storage.delete(url)
    assert not storage.exists(url)
    assert storage.list_names(storage.join(folder, "d")) == ["e", "empty"]


def test_many_are_deleted_at_once_and_those_that_are_gone_are_no_error(place: tuple[Storage, str]) -> None:
    storage, folder = place
    urls = [storage.join(folder, "d", str(number)) for number in range(100)]
    for url in urls[::2]:
        storage.write(url, b"x")
    storage.write(storage.join(folder, "d", "other"), b"x")

    storage.delete_all(urls)

    assert storage.list_names(storage.join(folder, "d")) == ["other"]


def test_what_cannot_be_deleted_is_reported_and_the_others_are_gone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "last").write_bytes(b"x")

    with pytest.raises(StorageError, match="must fit what lies there"):
        Storage().delete_all([str(tmp_path / "folder"), str(tmp_path / "last")])

    assert not (tmp_path / "last").exists()


def test_what_is_missing_says_so(place: tuple[Storage, str]) -> None:
    storage, folder = place
    url = storage.join(folder, "missing")

    assert not storage.exists(url)
    assert storage.list_names(url) == []
    assert storage.list_files(url) == {}
    for call in (storage.read, storage.size):
        with pytest.raises(FileNotFoundError) as caught:
            call(url)
        assert caught.value.filename == url


def test_an_object_is_called_otherwise_when_it_is_replaced_and_a_file_has_no_such_name(
    place: tuple[Storage, str],
) -> None:
    storage, folder = place
    url = storage.join(folder, "x")
    storage.write(url, b"1")
    first = storage.etag(url)
    storage.write(url, b"2")

    assert (first is None) == (not url.startswith("s3://"))
    assert first is None or first != storage.etag(url)
    storage.delete(url)
    with pytest.raises(FileNotFoundError):
        storage.etag(url)


def test_a_folder_does_not_exist_as_a_file(place: tuple[Storage, str]) -> None:
    storage, folder = place
    storage.write(storage.join(folder, "d", "x"), b"1")

    assert not storage.exists(storage.join(folder, "d"))


def test_check_accepts_a_good_place_and_leaves_nothing_there(place: tuple[Storage, str]) -> None:
    storage, folder = place

    storage.check(storage.join(folder, "new"), write=True)
    storage.check(storage.join(folder, "new"), write=False)

    assert storage.list_files(storage.join(folder, "new")) == {}


@pytest.mark.parametrize(
    ("changes", "url", "says"),
    [
        ({"key": "AKIAUNKNOWN"}, f"s3://{BUCKET}/x", "access key id"),
        ({"secret": "wrong"}, f"s3://{BUCKET}/x", "secret does not belong"),
        ({"secret": None}, f"s3://{BUCKET}/x", "credentials"),
        ({}, "s3://no-such-bucket/x", "bucket: must exist"),
        ({}, "s3://", "name a bucket"),
        ({"endpoint_url": "http://127.0.0.1:1"}, f"s3://{BUCKET}/x", "reachable"),
        ({"endpoint_url": "http://no-such-host.invalid"}, f"s3://{BUCKET}/x", "reachable"),
        ({"endpoint_url": "127.0.0.1:80"}, f"s3://{BUCKET}/x", "AWS_ENDPOINT_URL"),
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_check_reports_within_seconds_what_is_wrong_with_s3(
    s3: Storage, changes: dict[str, str | None], url: str, says: str, write: bool
) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match=says):
        replace(s3, **changes).check(url, write=write)
    assert time.monotonic() - began < 20  # three, and an attempt that is under way on a busy machine


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s4://bucket/x", "did you mean s3://"),
        ("s3:/bucket/x", "write s3://bucket/x"),
        ("oci://bucket@namespace/x", "pip install ocifs"),
        ("/proc/x/y", "folder"),
    ],
)
def test_check_reports_what_is_wrong_with_a_url(url: str, says: str) -> None:
    with pytest.raises(StorageError, match=says):
        Storage().check(url, write=True)


@pytest.mark.parametrize(
    "url", ["s3://AKIA:hush@bucket/x", "https://hush@host/x", "http://user:hush@host/x", "sftp://user:hush@host/x"]
)
def test_a_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    """It would be in recipes, reports and logs."""
    for use in (Storage().read, normal):
        with pytest.raises(StorageError, match="must hold no credentials") as refused:
            use(url)
        assert "hush" not in str(refused.value)


def test_an_at_sign_elsewhere_is_no_secret() -> None:
    for url in (
        "s3://bucket/a@b",
        "abfs://container@account/x",
        "sftp://user@host/x",
        "/tmp/a@b:c/x",
        "file:///a:b@c/x",
    ):
        normal(url)


def test_check_reports_that_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="path"):
        Storage().check(str(tmp_path / "file"), write=True)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, url = Storage(), str(tmp_path / "x")
    storage.write(url, b"before")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="ENOSPC"):
        storage.write(url, b"after")
    with pytest.raises(StorageError, match="ENOSPC"):
        storage.check(str(tmp_path), write=True)

    assert storage.list_files(str(tmp_path)) == {"x": 6}
    assert storage.read(url) == b"before"


def test_a_restarted_server_is_survived(s3: Storage) -> None:
    """The port is silent at first, as after a kill; a second server over moto's one state opens it later."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    s3.write(f"s3://{BUCKET}/survivor", b"data")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    restart = threading.Timer(2.0, server.start)
    restart.start()

    try:
        data = replace(s3, endpoint_url=f"http://127.0.0.1:{port}").read(f"s3://{BUCKET}/survivor")
    finally:
        restart.join()
        server.stop()

    assert data == b"data"


def test_secrets_stay_out_of_the_repr_and_survive_a_pickle() -> None:
    storage = Storage.from_environment(
        {"AWS_ENDPOINT_URL": "http://h:1", "AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "SECRET"}
        | {"AWS_SESSION_TOKEN": "TOKEN", "AWS_DEFAULT_REGION": "eu-west-1"}
    )

    assert pickle.loads(pickle.dumps(storage)) == storage
    assert storage.secret == "SECRET" and storage.region == "eu-west-1" and storage.endpoint_url == "http://h:1"
    assert not any(secret in repr(storage) for secret in ("KEY", "SECRET", "TOKEN"))
    assert Storage.from_environment({}) == Storage()


@pytest.mark.parametrize(
    ("url", "expected"), [("a/b", str(Path.cwd() / "a/b")), ("/a/b", "/a/b"), ("s3://a/b", "s3://a/b")]
)
def test_absolute_means_the_same_in_every_working_directory(url: str, expected: str) -> None:
    assert normal(url) == expected


def test_join_puts_one_slash_between_parts() -> None:
    assert Storage.join("s3://b/a/", "c", "d") == "s3://b/a/c/d"


def test_an_empty_url_is_no_folder() -> None:
    for call in (Storage().read, normal):
        with pytest.raises(StorageError, match="URL: must not be empty"):
            call("")


def test_memory_of_one_process_is_no_place_for_several() -> None:
    Storage().check("memory://alone", write=True)
    with pytest.raises(StorageError, match="must be one that every process sees"):
        Storage().check("memory://alone", write=True, shared=True)


def test_of_many_that_replace_the_same_content_one_succeeds(place: tuple[Storage, str]) -> None:
    storage, folder = place
    url = storage.join(folder, "value")
    storage.write(url, b"old")
    outcomes: list[bool] = []
    start = threading.Barrier(8)

    def replace_it(number: int) -> None:
        start.wait()
        outcomes.append(storage.replace(url, b"new %d" % number, b"old"))

    threads = [threading.Thread(target=replace_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == [False] * 7 + [True]
    assert storage.read(url).startswith(b"new ")
    assert storage.replace(url, storage.read(url), b"old"), "its own answer may have been lost"
    with pytest.raises(FileNotFoundError):
        storage.replace(storage.join(folder, "nothing"), b"new", b"old")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_who_may_read_a_local_file_is_up_to_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        storage = Storage()
        storage.write(str(tmp_path / "deep" / "written"), b"1")
        storage.create(str(tmp_path / "created"), b"1")
        storage.replace(str(tmp_path / "created"), b"2", b"1")
        storage.write(str(tmp_path / ("x" * 255)), b"1")
    finally:
        os.umask(before)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert sorted(len(path.name) for path in files) == [7, 7, 255]
