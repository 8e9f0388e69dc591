"""Settings of S3: what an environment says, compared with botocore's own client, and looked up only once."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from guarded_s3 import GuardedS3, Principal

from pipeline.errors import CredentialsError, StorageError
from pipeline.store.storage import Storage

URL = "s3://bucket/x"
CONFIG = """
[default]
region = eu-west-3

[profile lab]
region = eu-central-1
endpoint_url = http://lab.test:9000

[profile served]
services = stores
endpoint_url = http://not-this.test

[services stores]
s3 =
  endpoint_url = http://served.test:9001

[profile tuned]
endpoint_url = http://tuned.test
s3 =
  addressing_style = path
  payload_signing_enabled = true
request_checksum_calculation = when_required
"""
CREDENTIALS = """
[default]
aws_access_key_id = DEFAULTKEY
aws_secret_access_key = default-secret

[lab]
aws_access_key_id = LABKEY
aws_secret_access_key = lab-secret
aws_session_token = lab-token

[served]
aws_access_key_id = SERVEDKEY
aws_secret_access_key = served-secret
"""
KEYS = {"AWS_ACCESS_KEY_ID": "ENVKEY", "AWS_SECRET_ACCESS_KEY": "env-secret"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has nothing of AWS, and no files of its user's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Variables that name a config and a credentials file."""
    (tmp_path / "config").write_text(CONFIG)
    (tmp_path / "credentials").write_text(CREDENTIALS)
    return named(tmp_path)


def named(folder: Path) -> dict[str, str]:
    return {"AWS_CONFIG_FILE": str(folder / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials")}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"AWS_PROFILE": "lab"},
        {"AWS_DEFAULT_PROFILE": "served", "AWS_PROFILE": "lab"},
        {"AWS_PROFILE": "served"},
        {"AWS_PROFILE": "tuned", **KEYS},
        {"AWS_PROFILE": "lab", **KEYS},
        {"AWS_PROFILE": "lab", **KEYS, "AWS_SESSION_TOKEN": "env-token"},
        {"AWS_ENDPOINT_URL": "http://all.test", "AWS_PROFILE": "served"},
        {"AWS_ENDPOINT_URL": "http://all.test", "AWS_ENDPOINT_URL_S3": "http://s3.test:1"},
        {"AWS_ENDPOINT_URL": "http://all.test", "AWS_ENDPOINT_URL_S3": ""},
        {"AWS_ENDPOINT_URL": "", "AWS_PROFILE": "lab", "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
        {"AWS_PROFILE": "lab", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
        {"AWS_PROFILE": "lab", "AWS_DEFAULT_REGION": "us-west-2"},
        {"AWS_SESSION_TOKEN": "of-nobody"},
        {"AWS_SECRET_ACCESS_KEY": "of-nobody"},
        {"AWS_PROFILE": "", "AWS_DEFAULT_PROFILE": "", "AWS_CONFIG_FILE": ""},
    ],
)
def test_it_is_what_botocore_finds_where_empty_variables_are_none(
    variables: dict[str, str], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {**files, **variables}
    storage = Storage.from_environment({**environ, "HOME": os.environ["HOME"]})

    for name, value in environ.items():
        if value:
            monkeypatch.setenv(name, value)
    session = botocore.session.Session()
    client = session.create_client("s3", region_name=session.get_config_variable("region") or "us-east-1")
    found = session.get_credentials()
    own = storage.endpoint_url or f"https://s3.{storage.region}.amazonaws.com"
    assert client.meta.endpoint_url in (own, "https://s3.amazonaws.com")
    assert client.meta.region_name == storage.region
    assert (storage.key, storage.secret, storage.token) == (
        (found.access_key, found.secret_key, found.token) if found else (None, None, None)
    )
    assert bool((client.meta.config.s3 or {}).get("payload_signing_enabled")) == bool(
        dict(storage.client).get("s3.payload_signing_enabled")
    )


@pytest.mark.parametrize(
    ("variables", "origins"),
    [
        (
            {"AWS_PROFILE": "lab"},
            ("endpoint_url of profile lab of {0}", "region of profile lab of {0}", "profile lab of {0}"),
        ),
        (
            {**KEYS, "AWS_ENDPOINT_URL_S3": "http://a.test", "AWS_REGION": "eu-west-1"},
            ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_ACCESS_KEY_ID"),
        ),
        ({"AWS_CONFIG_FILE": "", **KEYS}, ("AWS_ENDPOINT_URL (unset: AWS)", "the default", "AWS_ACCESS_KEY_ID")),
    ],
)
def test_it_says_where_each_comes_from(
    variables: dict[str, str], origins: tuple[str, ...], files: dict[str, str]
) -> None:
    found = dict(Storage.from_environment({**files, **variables}).origins)

    expected = [text.format(files["AWS_CONFIG_FILE"]) for text in origins]
    assert [found["endpoint"], found["region"], found["credentials"]] == expected


@pytest.mark.parametrize(
    ("config", "variables", "says"),
    [
        ("", {"AWS_PROFILE": "gone"}, "^AWS_PROFILE: must name a profile of .*config or .*credentials, got 'gone'"),
        ("[profile a]\n", {"AWS_DEFAULT_PROFILE": "gone"}, "^AWS_DEFAULT_PROFILE: .*there are: a$"),
        ("region = x\n", {}, "^AWS_CONFIG_FILE: must be a file that botocore can read"),
        ("[default\n", {}, "^AWS_CONFIG_FILE: must be a file that botocore can read"),
        ("[default]\ns3 =\n  addressing_style\n", {}, "^AWS_CONFIG_FILE: must be a file that botocore can read"),
        ("\xff\xfe[", {}, "^AWS_CONFIG_FILE: must be a file that botocore can read"),
        ("[default]\nservices = none\n", {}, "services"),
        ("[default]\nservices = s\n[services s]\ns3 = http://x\n", {}, "^AWS configuration: .*profile default of"),
        ("[default]\nendpoint_url = x.test:80\n", {}, "^endpoint_url of profile default of .*: must be an S3 endpoint"),
        ("", {"AWS_ENDPOINT_URL": "127.0.0.1:80"}, "^AWS_ENDPOINT_URL: must be an S3 endpoint like http://host:port"),
        ("", {"AWS_ENDPOINT_URL_S3": "s3://x"}, "^AWS_ENDPOINT_URL_S3: must be an S3 endpoint"),
        ("", {"AWS_RETRY_MODE": "foo"}, "^AWS_RETRY_MODE: must be a retry mode, got 'foo'; write legacy, standard"),
        ("[default]\nretry_mode = foo\n", {}, "^retry_mode of profile default of .*: must be a retry mode"),
        ("", {"AWS_MAX_ATTEMPTS": "many"}, "^AWS_MAX_ATTEMPTS: must be a whole number"),
        ("", {"AWS_REGION": "eu west"}, "^AWS_REGION: must name a region"),
        ("", {"AWS_ACCESS_KEY_ID": "A"}, "^AWS_SECRET_ACCESS_KEY: must come with AWS_ACCESS_KEY_ID"),
        (
            "[default]\naws_access_key_id = A\n",
            {},
            "^AWS profile: must have a secret with its key, got 'profile default",
        ),
        ("[default]\ns3 =\n  addressing_style = dns\n", {}, "^s3.addressing_style of profile default of"),
        ("[default]\nca_bundle = /none.pem\n", {}, "^ca_bundle of profile default of .*certificates, got '/none.pem'"),
        ("", {"AWS_CA_BUNDLE": "/none.pem"}, "^AWS_CA_BUNDLE: must be a file with certificates"),
        (
            "",
            {"AWS_REQUEST_CHECKSUM_CALCULATION": "no"},
            "^AWS_REQUEST_CHECKSUM_CALCULATION: must be one that botocore",
        ),
        (
            "[default]\nendpoint_url = http://x.test\ns3 =\n  use_accelerate_endpoint = true\n",
            {},
            "^s3.use_accelerate_endpoint of profile default of .*: must be off with the endpoint http://x.test",
        ),
        (
            "",
            {"AWS_ENDPOINT_URL": "http://x.test", "AWS_USE_FIPS_ENDPOINT": "true"},
            "^AWS_USE_FIPS_ENDPOINT: must be off",
        ),
    ],
)
def test_what_cannot_be_used_is_named_by_variable_or_file(
    config: str, variables: dict[str, str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "config").write_bytes(config.encode("latin-1"))

    with pytest.raises(StorageError, match=says) as caught:
        Storage.from_environment({"AWS_CONFIG_FILE": str(tmp_path / "config"), **variables})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["aws_secret_access_key = hidden\n", "[default]\naws_secret_access_key hidden\n", "[default\nx = hidden\n"]
)
def test_a_damaged_file_is_reported_by_line_and_not_by_what_it_holds(text: str, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(text)

    with pytest.raises(StorageError, match=r"^AWS_SHARED_CREDENTIALS_FILE: .*, line \d\)") as caught:
        Storage.from_environment(named(tmp_path))
    assert "hidden" not in str(caught.value)


def test_an_accelerated_bucket_of_aws_stays_one(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n  use_accelerate_endpoint = true\n")
    storage = Storage.from_environment({**named(tmp_path), **KEYS})

    assert dict(storage.client) == {"s3.use_accelerate_endpoint": True}
    assert Storage.from_json(json.loads(json.dumps(storage.to_json()))) == storage


@pytest.fixture
def guard(open_s3: Storage) -> Iterator[GuardedS3]:
    open_s3.write(URL, b"data")
    with GuardedS3(open_s3, {"MINE": Principal(), "ASIA1": Principal("token-1")}).running() as guard:
        yield guard


HOSTILE = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
    "AWS_ACCESS_KEY_ID": "THEIRS",
    "AWS_SECRET_ACCESS_KEY": "theirs",
    "AWS_SESSION_TOKEN": "theirs",
    "AWS_DEFAULT_REGION": "eu-south-1",
    "AWS_PROFILE": "gone",
    "AWS_RETRY_MODE": "foo",
    "AWS_USE_FIPS_ENDPOINT": "true",
}


def test_no_process_that_gets_it_looks_again(guard: GuardedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {guard.endpoint}\n")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = MINE\naws_secret_access_key = mine\n")
    given = pickle.dumps(Storage.from_environment({**named(tmp_path), "AWS_PROFILE": "lab"}))

    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config").unlink()
    (tmp_path / "credentials").unlink()

    there = pickle.loads(given)
    assert there.read(URL) == b"data" and "x" in there.list_names("s3://bucket")
    assert {seen.key_id for seen in guard.seen} == {"MINE"}
    assert "us-east-1" in guard.seen[0].headers["authorization"]


def test_aws_itself_is_no_invitation_to_look_elsewhere(guard: GuardedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller meant AWS; a process whose environment names another store must not take that."""
    given = replace(Storage.from_environment(KEYS), retry_seconds=0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", guard.endpoint)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # so that nothing leaves this machine

    with pytest.raises(StorageError, match="must be reachable"):
        given.read(URL)
    assert guard.seen == []


def test_keys_of_a_process_go_to_no_other_endpoint_than_theirs(
    guard: GuardedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = replace(Storage.from_environment({"AWS_ENDPOINT_URL": guard.endpoint}), retry_seconds=0.1)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, HOSTILE[name])

    with pytest.raises(CredentialsError, match=f"those of this process belong to {HOSTILE['AWS_ENDPOINT_URL']}"):
        caller.read(URL)
    assert guard.seen == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", guard.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "MINE")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert caller.read(URL) == b"data", "the same store: each machine's own keys"


def process_profile(folder: Path, endpoint: str) -> dict[str, str]:
    """Variables of a profile whose keys a program tells: what lies in the folder's `keys.json`."""
    program = folder / "program.py"
    program.write_text(f"print(open({str(folder / 'keys.json')!r}).read())")
    (folder / "config").write_text(
        f"[profile made]\nendpoint_url = {endpoint}\ncredential_process = {sys.executable} {program}\n"
    )
    return {**named(folder), "AWS_PROFILE": "made"}


def issue(folder: Path, number: int, **fields: Any) -> None:
    keys = {"Version": 1, "AccessKeyId": f"ASIA{number}", "SecretAccessKey": "made", "SessionToken": f"token-{number}"}
    (folder / "keys.json").write_text(json.dumps({**keys, **fields}))


def test_keys_that_a_process_makes_are_made_again_when_they_are_refused(guard: GuardedS3, tmp_path: Path) -> None:
    issue(tmp_path, 1)
    storage = Storage.from_environment(process_profile(tmp_path, guard.endpoint))
    assert storage.key is None and storage.read(URL) == b"data"

    guard.principals["ASIA1"].refusal = "ExpiredToken"
    guard.principals["ASIA2"] = Principal("token-2")
    issue(tmp_path, 2)

    assert storage.read(URL) == b"data"
    assert guard.seen[-1].key_id == "ASIA2"


def test_they_travel_as_they_are_at_that_moment_and_are_asked_for_again_later(guard: GuardedS3, tmp_path: Path) -> None:
    issue(tmp_path, 1)
    profile = Storage.from_environment(process_profile(tmp_path, guard.endpoint))
    there = pickle.loads(pickle.dumps(profile))
    assert there.profile is None and (there.key, there.token) == ("ASIA1", "token-1")
    assert there.read(URL) == b"data"

    guard.principals["ASIA1"].refusal = "ExpiredToken"
    guard.principals["ASIA2"] = Principal("token-2")
    issue(tmp_path, 2)
    asked: list[None] = []

    def ask() -> Any:
        asked.append(None)
        assert profile.profile
        profile.profile.forget()
        return profile.profile.now()

    assert replace(there, renewal=ask, retry_seconds=30).read(URL) == b"data"
    assert asked and guard.seen[-1].key_id == "ASIA2"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            "sso_start_url = https://x.test/start\nsso_region = us-east-1\nsso_account_id = 1\nsso_role_name = r\n",
            "aws sso login --profile it",
        ),
        ("sso_session = s\nsso_account_id = 1\nsso_role_name = r\n", "profile it of .*config"),
        ("credential_process = /no/such/program\n", "profile it of .*config"),
        ("role_arn = arn:aws:iam::1:role/r\nsource_profile = gone\n", "profile it of .*config.*gone"),
        ("role_arn = arn:aws:iam::1:role/r\nweb_identity_token_file = /none\n", "profile it of .*config.*/none"),
    ],
)
def test_a_profile_that_has_no_keys_now_is_reported_in_seconds(
    config: str, says: str, guard: GuardedS3, tmp_path: Path
) -> None:
    sessions = "[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://x.test/start\n"
    (tmp_path / "config").write_text(f"[profile it]\nendpoint_url = {guard.endpoint}\n{config}\n{sessions}")
    storage = Storage.from_environment({**named(tmp_path), "AWS_PROFILE": "it"})

    for attempt in (lambda: storage.check("s3://bucket/folder", write=False), lambda: pickle.dumps(storage)):
        with pytest.raises(CredentialsError, match=says) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert guard.seen == []


def test_a_role_is_assumed_with_the_profiles_keys(
    guard: GuardedS3, open_s3: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        f"[profile work]\nendpoint_url = {guard.endpoint}\nrole_arn = arn:aws:iam::111122223333:role/work\n"
        "source_profile = base\nregion = us-east-1\n"
    )
    (tmp_path / "credentials").write_text("[base]\naws_access_key_id = BASE\naws_secret_access_key = base\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", str(open_s3.endpoint_url))
    there = Storage.from_environment({**named(tmp_path), "AWS_PROFILE": "work"}).for_others()

    assert str(there.key).startswith("ASIA") and there.token
    guard.principals[str(there.key)] = Principal(str(there.token))
    assert there.read(URL) == b"data"


def test_secrets_of_a_profile_are_not_shown(files: dict[str, str]) -> None:
    storage = Storage.from_environment({**files, "AWS_PROFILE": "lab"})

    text = repr(storage) + repr(storage.origins)
    assert not any(secret in text for secret in ("LABKEY", "lab-secret", "lab-token"))


def test_relative_files_are_found_from_every_folder(
    tmp_path: Path, files: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage.from_environment(
        {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_PROFILE": "lab"}
    )
    monkeypatch.chdir("/")

    assert storage.for_others().key == "LABKEY"
