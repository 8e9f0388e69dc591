"""Options of S3: what is refused, and that they reach requests however these are made."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from guarded_s3 import GuardedS3, Principal

from pipeline.access.s3_options import OBSTORE, READER, S3Options
from pipeline.errors import StorageError
from pipeline.store.storage import Storage

URL = "s3://bucket/folder/x"
KEY = "1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.fixture
def guard(open_s3: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardedS3]:
    """Stands for every host of its domain, as a web proxy does, so that no name needs to be resolved."""
    with GuardedS3(open_s3, {"AKIA": Principal()}, domain="s3.test").running() as guard:
        monkeypatch.setenv("http_proxy", guard.endpoint)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield guard


def reached(guard: GuardedS3, reader: str, **variables: str) -> set[tuple[str, str]]:
    """Host and path of the requests that write, read, list and delete an object take."""
    keys = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "theirs", "AWS_REGION": "us-east-1"}
    # A region of its own, where the same value shall be another client.
    storage = Storage.from_environment({"AWS_ENDPOINT_URL": "http://s3.test", READER: reader, **keys, **variables})
    storage.write(URL, b"data")
    assert storage.read(URL) == b"data" and storage.size(URL) == 4
    assert storage.list_names("s3://bucket/folder") == ["x"]
    storage.delete(URL)
    found = {(seen.host, seen.path.removesuffix("/folder/x")) for seen in guard.seen}
    guard.seen.clear()
    return found


def test_buckets_are_addressed_as_asked(guard: GuardedS3, tmp_path: Path, reader: str) -> None:
    path, virtual = {("s3.test", "/bucket")}, {("bucket.s3.test", ""), ("bucket.s3.test", "/")}

    assert reached(guard, reader, CONVMAE_S3_ADDRESSING="path") == path
    assert reached(guard, reader, CONVMAE_S3_ADDRESSING="virtual") == virtual
    file = {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    for style, expected in (("path", path), ("virtual", virtual)):
        (tmp_path / "config").write_text(f"[default]\ns3 =\n  addressing_style = {style}\n")
        assert reached(guard, reader, **file) == expected, "botocore reads it of the profile"
    assert reached(guard, reader, CONVMAE_S3_ADDRESSING="path", **file) == path, "the variable wins"


def test_without_options_no_request_has_them(guard: GuardedS3, reader: str) -> None:
    storage = Storage("http://s3.test", "AKIA", "theirs", region="us-east-1", s3=S3Options(reader=reader))
    storage.write(URL, b"data")
    assert storage.read(URL) == b"data"
    storage.delete(URL)

    names = {name for seen in guard.seen for name in seen.headers}
    assert not any("request-payer" in name or "encryption" in name for name in names)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CONVMAE_S3_REQUEST_PAYER": "me"}, "CONVMAE_S3_REQUEST_PAYER: must be requester, got 'me'"),
        ({"CONVMAE_S3_KMS_KEY_ID": "my key"}, "CONVMAE_S3_KMS_KEY_ID: must name a KMS key"),
        ({"CONVMAE_S3_KMS_KEY_ID": "arn:aws:s3:::bucket"}, "CONVMAE_S3_KMS_KEY_ID: must name a KMS key"),
        ({"CONVMAE_S3_KMS_KEY_ID": KEY, "CONVMAE_S3_KMS_BUCKET_KEY": "yes"}, "must be true or false, got 'yes'"),
        ({"CONVMAE_S3_KMS_BUCKET_KEY": "true"}, "CONVMAE_S3_KMS_BUCKET_KEY: must come with a key"),
        ({"CONVMAE_S3_ADDRESSING": "dns"}, "CONVMAE_S3_ADDRESSING: must be a way to address buckets"),
        ({"CONVMAE_S3_READER": "boto3"}, "CONVMAE_S3_READER: must be s3fs or obstore, got 'boto3'"),
    ],
)
def test_what_s3_does_not_know_is_refused_by_the_variables_name(variables: dict[str, str], says: str) -> None:
    with pytest.raises(StorageError, match=says):
        Storage.from_environment(variables)


@pytest.mark.parametrize(
    "key",
    [KEY, "mrk-1234abcd12ab34cd56ef1234567890ab", "alias/aws/s3", f"arn:aws-cn:kms:cn-north-1:111122223333:key/{KEY}"],
)
def test_keys_are_named_by_id_alias_or_arn(key: str) -> None:
    storage = Storage.from_environment({"CONVMAE_S3_KMS_KEY_ID": key, "CONVMAE_S3_REQUEST_PAYER": ""})

    assert pickle.loads(pickle.dumps(storage)).s3 == S3Options(kms_key_id=key)
    assert storage.s3.call_arguments == {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key}


def test_what_reads_bodies_travels_to_other_processes() -> None:
    storage = Storage.from_environment({READER: OBSTORE})

    for there in (pickle.loads(pickle.dumps(storage)), Storage.from_json(json.loads(json.dumps(storage.to_json())))):
        assert there.s3.reader == OBSTORE and there == storage
