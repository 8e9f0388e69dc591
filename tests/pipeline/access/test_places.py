"""Listed names lie below their root, whatever they spell; what a user gave has one normal form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.access.places import Given, Listed, is_place, normal
from pipeline.access.s3_options import S3Options
from pipeline.errors import RefusedError, StorageError
from pipeline.ingest.source import Sources
from pipeline.ingest.sources import find_sources
from pipeline.store.storage import Storage

SEGMENTS = st.sampled_from(["", "", ".", "..", "http:", "s3:", "file:", "127.0.0.1:1", "tmp", "etc", "~", "a"])
NAMES = st.text(st.sampled_from("ab /.?#%&=+~:;,*[]{}@\\\n\r\t\u00e9\u2028\u200b\U0001f642"), max_size=12)
KEYS = st.lists(st.one_of(SEGMENTS, NAMES), min_size=1, max_size=5).map("/".join)
ODD_KEYS = (
    "leak//etc/hostname.jpg",
    "/etc/hostname.jpg",
    "byurl/http://127.0.0.1:1/a.jpg",
    "http://127.0.0.1:1/a.jpg",
    "s3://other/a.jpg",
    "file:///etc/a.jpg",
    "seg//1.jpg",
    "a/../b.jpg",
    "../b.jpg",
    "a/./b.jpg",
    "v.jpg?versionId=3.jpg",
    "ha#sh.jpg",
    "per%20cent%2F.jpg",
    " lead.jpg",
    "trail .jpg ",
    "new\nline.jpg",
    "co\rret.jpg",
    "~/x.jpg",
    "st*ar?[].jpg",
    "{1..3}.jpg",
)


@pytest.fixture(scope="module")
def client(open_s3: Storage) -> Any:
    """The same store by other means."""
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=open_s3.endpoint_url, **keys)


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[Path]:
    """A file of this machine that must not be read."""
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"secret")
    yield path


def emptied(client: Any, prefix: str) -> None:
    for item in client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", []):
        client.delete_object(Bucket="bucket", Key=item["Key"])


def put(client: Any, prefix: str, keys: Iterable[str]) -> set[str]:
    """Objects that hold their own keys; moto itself takes no line ends in keys."""
    taken = {key for key in keys if not {"\n", "\r"} & {*key}}
    for key in taken:
        client.put_object(Bucket="bucket", Key=prefix + key, Body=key.encode())
    return taken


def read_or_refused(storage: Storage, root: str) -> dict[str, bytes | None]:
    """The object that each listed name is read as; None where it is refused."""
    found: dict[str, bytes | None] = {}
    for name in storage.list_files(root):
        try:
            found[name] = storage.read_start(Listed(name).url(root), 100)
        except RefusedError as refused:
            assert repr(name)[1:-1] in str(refused)
            found[name] = None
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(KEYS, min_size=1, max_size=4))
@example(set(ODD_KEYS))
def test_a_key_is_read_as_the_object_that_it_names_or_is_refused(
    open_s3: Storage, client: Any, bait: Path, reader: str, keys: set[str]
) -> None:
    emptied(client, "root/")
    keys |= {str(bait), f"x/{bait}", f"memory:/{bait}", f"file://{bait}"}
    keys = put(client, "root/", keys - {""})  # which would be an empty object that stands for a folder

    found = read_or_refused(replace(open_s3, s3=S3Options(reader=reader)), "s3://bucket/root")

    assert set(found) == keys
    for key, data in found.items():
        assert data in (None, key.encode())
    refused = {key for key, data in found.items() if data is None}
    assert all(key.endswith("/") or {".", ".."} & {*key.split("/")} for key in refused)


NAME_ON_DISK = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NAME_ON_DISK, min_size=1, max_size=3))
@example(["http:", "127.0.0.1:1", "a.jpg"])
@example(["~", "a.jpg"])
@example(["s3:", "b"])
@example(["a.jpg?versionId=3"])
@example([" ", "new\nline "])
def test_a_file_is_read_as_what_it_is(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    if {".", ".."} & {*parts}:
        return
    root = tmp_path_factory.mktemp("root")
    path = root.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"this one")

    assert read_or_refused(Storage(), str(root)) == {"/".join(parts): b"this one"}


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/etc/hostname", "a/./b.jpg", ".."])
def test_a_name_does_not_lead_out_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")

    with pytest.raises(RefusedError, match="must mean one object below what was listed"):
        Listed(name).url(str(tmp_path / "root"))


def test_images_with_odd_keys_are_sharded_from_the_store_alone(open_s3: Storage, client: Any) -> None:
    emptied(client, "photos/")
    put(client, "photos/", ODD_KEYS)
    sources = find_sources(open_s3, "s3://bucket/photos")
    assert isinstance(sources, Sources)

    for image in sources.images:
        if {".", ".."} & {*image.path.text.split("/")}:
            with pytest.raises(RefusedError):
                image.read(open_s3, sources.root)
        else:
            assert image.read(open_s3, sources.root) == image.path.text.encode()


def test_a_key_with_a_query_is_written_and_deleted_as_itself(open_s3: Storage, client: Any) -> None:
    """s3fs takes the query for a version, and would delete the object before it."""
    for key in ("q/a.jpg", "q/a.jpg?versionId=1"):
        open_s3.write(f"s3://bucket/{key}", key.encode())

    open_s3.delete("s3://bucket/q/a.jpg?versionId=1")

    assert client.get_object(Bucket="bucket", Key="q/a.jpg")["Body"].read() == b"q/a.jpg"
    assert open_s3.list_files("s3://bucket/q") == {"a.jpg": 7}


def test_objects_that_stand_for_folders_are_ignored(open_s3: Storage, client: Any) -> None:
    for key in ("marked/", "marked/cats/", "marked/dogs_$folder$", "marked_$folder$", "marked/cats/empty/"):
        client.put_object(Bucket="bucket", Key=key, Body=b"")
    client.put_object(Bucket="bucket", Key="marked/cats/1.jpg", Body=b"cat")
    client.put_object(Bucket="bucket", Key="marked/zero.jpg", Body=b"")

    assert open_s3.list_files("s3://bucket/marked") == {"cats/1.jpg": 3, "zero.jpg": 0}
    assert open_s3.list_names("s3://bucket/marked") == ["cats", "zero.jpg"]
    assert open_s3.list_names("s3://bucket/marked/cats/empty") == []
    assert not open_s3.exists("s3://bucket/marked")


def test_an_object_is_not_below_itself(open_s3: Storage) -> None:
    open_s3.write("s3://bucket/alone.jpg", b"one")

    assert open_s3.list_files("s3://bucket/alone.jpg") == {}
    assert open_s3.list_names("s3://bucket/alone.jpg") == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("s3://b/x/", "s3://b/x"),
        ("s3://b//x///y//", "s3://b/x/y"),
        ("s3a://b/x", "s3://b/x"),
        ("S3N://b/x", "s3://b/x"),
        ("S3://B/X", "s3://B/X"),
        ("s3://b/", "s3://b"),
        ("GCS://b/x/", "gs://b/x"),
        ("hdfs:///x//y/", "hdfs:///x/y"),
        ("HTTP://h/x//y/", "http://h/x//y"),
        ("http://h/x/?q=/", "http://h/x/?q=/"),
        ("file:///tmp/x/", "/tmp/x"),
        ("FILE://localhost/tmp//x", "/tmp/x"),
        ("local:///tmp/x", "/tmp/x"),
        ("//tmp//x/./y/", "/tmp/x/y"),
        ("/", "/"),
        ("~/x/", "/home/me/x"),
        ("~", "/home/me"),
        ("ds/", "/work/ds"),
        ("./ds", "/work/ds"),
        (".", "/work"),
        ("file://ds", "/work/ds"),
    ],
)
def test_a_place_has_one_normal_form(written: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)

    expected = meant.replace("/work", str(tmp_path), 1)
    assert normal(written) == expected
    assert normal(normal(written)) == expected


def test_two_dots_are_resolved_as_the_file_system_does(tmp_path: Path) -> None:
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")

    assert normal(f"{tmp_path}/link/../x") == f"{tmp_path.resolve()}/far/x"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "must name a bucket"),
        ("S3:///key", "must name a bucket"),
        ("s3://b/a/../c", "must have no . or .. in it.*write s3://b/c"),
        ("S3:/b/x", "must have two slashes"),
        ("s4://b/x", "did you mean s3"),
        ("", "must not be empty"),
    ],
)
def test_what_is_no_place_is_refused(url: str, says: str) -> None:
    with pytest.raises(StorageError, match=says):
        normal(url)


def test_a_source_is_taken_exactly_since_slashes_in_a_row_are_part_of_keys() -> None:
    assert Given("S3A://b/x//y.jpg").url("/w") == "s3://b/x//y.jpg"
    assert Given("a//b.jpg").url("s3://b/lists") == "s3://b/lists/a//b.jpg"


def test_a_path_is_distinguished_from_a_name() -> None:
    assert all(map(is_place, ("a/b", "./a", "a/", "/a", "~/a", "~", ".", "..", "s3://b/a")))
    assert not any(map(is_place, ("a", "a.b", "run-1", ".a")))


def test_a_whole_url_is_read_where_the_working_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    assert normal("s3a://bucket/run/") == "s3://bucket/run"
    assert normal("/data//run/") == "/data/run"
