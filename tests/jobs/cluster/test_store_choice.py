"""The user's store or the local stack's, as a whole: never the endpoint of one with keys of the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs.cluster.session import Session
from jobs.cluster.store_choice import STACK_ORIGIN, STORE_VARIABLE, chosen_store, is_of_stack
from jobs.stack.ports import Ports
from jobs.stack.record import Stack
from jobs.stack.services import StackSettings, service_environment
from pipeline.errors import StorageError
from pipeline.store.storage import Storage

OWN = {"AWS_ACCESS_KEY_ID": "MINE", "AWS_SECRET_ACCESS_KEY": "mine"}
FAULTS = {
    "AWS_PROFILE": "gone",
    "AWS_DEFAULT_PROFILE": "gone",
    "AWS_ENDPOINT_URL": "no-address",
    "AWS_ENDPOINT_URL_S3": "no-address",
    "AWS_RETRY_MODE": "foo",
    "AWS_MAX_ATTEMPTS": "foo",
}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    ports = Ports(**{name: 20000 + number for number, name in enumerate(Ports.__dataclass_fields__)})
    home = tmp_path / "home"
    return Stack(StackSettings("id", home, home, ports, "STACKKEY", "stack-secret", "internal", 2, None), None, {})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose owner has a default profile with keys and an endpoint, as many users do."""
    folder = tmp_path / "user" / ".aws"
    folder.mkdir(parents=True)
    (folder / "credentials").write_text("[default]\naws_access_key_id = DEFAULT\naws_secret_access_key = default\n")
    (folder / "config").write_text(
        "[default]\nendpoint_url = http://work.test\n[profile tuned]\nregion = us-west-2\n"
        "[profile lab]\nendpoint_url = http://lab.test\naws_access_key_id = LAB\naws_secret_access_key = lab\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    return folder


def parts(storage: Storage) -> tuple[str | None, str | None, str | None]:
    return storage.endpoint_url, storage.key, storage.token


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-1"},
        {"AWS_SESSION_TOKEN": "stale"},
        {"AWS_SECRET_ACCESS_KEY": "stale"},
        {"AWS_RETRY_MODE": "standard"},
        dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID"), ""),
        {"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"},
        {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1/x"},
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/x", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x"},
        {"AWS_ENDPOINT_URL": "STACK"},
        {"AWS_ENDPOINT_URL": "STACK", "AWS_ACCESS_KEY_ID": "STACKKEY", "AWS_SECRET_ACCESS_KEY": "stack-secret"},
    ],
)
def test_variables_that_name_no_store_leave_the_stacks(variables: dict[str, str], stack: Stack, files: Path) -> None:
    environ = {name: value.replace("STACK", stack.endpoint, value == "STACK") for name, value in variables.items()}
    found = chosen_store(environ, stack)

    assert parts(found) == (stack.endpoint, "STACKKEY", None) and found.secret == "stack-secret"
    assert found.region == "us-east-1" and found.profile is None and is_of_stack(found, stack)
    assert {origin for _, origin in found.origins} == {STACK_ORIGIN}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (OWN, ("http://work.test", "MINE", None)),
        ({**OWN, "AWS_SESSION_TOKEN": "t", "AWS_ENDPOINT_URL": "http://a.test"}, ("http://a.test", "MINE", "t")),
        ({"AWS_ENDPOINT_URL": "http://a.test"}, ("http://a.test", "DEFAULT", None)),
        ({"AWS_ENDPOINT_URL_S3": "http://a.test"}, ("http://a.test", "DEFAULT", None)),
        ({"AWS_PROFILE": "lab"}, ("http://lab.test", "LAB", None)),
        ({"AWS_PROFILE": "default"}, ("http://work.test", "DEFAULT", None)),
        ({"AWS_PROFILE": "tuned"}, (None, None, None)),
        ({"AWS_CONFIG_FILE": "FILES/config"}, ("http://work.test", "DEFAULT", None)),
        ({"AWS_SHARED_CREDENTIALS_FILE": "FILES/credentials"}, ("http://work.test", "DEFAULT", None)),
    ],
)
def test_variables_that_name_a_store_choose_it_with_nothing_of_the_stacks(
    variables: dict[str, str], expected: tuple[str | None, ...], stack: Stack, files: Path
) -> None:
    environ = {name: value.replace("FILES", str(files)) for name, value in variables.items()}
    found = chosen_store(environ, stack)

    assert parts(found) == expected
    assert not is_of_stack(found, stack)
    assert "stack" not in str(found.secret) and STACK_ORIGIN not in {origin for _, origin in found.origins}


@pytest.mark.parametrize("variable", FAULTS)
def test_a_fault_is_reported_when_s3_is_used_and_not_before(variable: str, stack: Stack, tmp_path: Path) -> None:
    for found in (
        chosen_store({variable: FAULTS[variable]}, stack),
        chosen_store({variable: FAULTS[variable]}, None),
    ):
        found.write(str(tmp_path / "x"), b"a local file")
        with pytest.raises(StorageError, match=f"^{variable}: "):
            found.read("s3://bucket/x")
        with pytest.raises(StorageError, match=f"^{variable}: "):
            found.check("s3://bucket/x", write=True)


def test_a_file_that_does_not_fit_the_stack_is_named(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n  use_accelerate_endpoint = true\n")
    fault = chosen_store({"AWS_CONFIG_FILE": str(tmp_path / "config")}, stack).fault

    assert str(fault).startswith(f"s3.use_accelerate_endpoint of profile default of {tmp_path / 'config'}: must be off")


def test_settings_sent_with_a_job_override_all_others(stack: Stack) -> None:
    callers = Storage(
        "http://callers.test", "CALLER", "callers", "token", client=(("s3.payload_signing_enabled", True),)
    )
    environ = {**OWN, "AWS_PROFILE": "gone", STORE_VARIABLE: json.dumps(callers.to_json())}

    assert chosen_store(environ, stack) == callers
    opened = Session.open({**environ, "CONVMAE_HOME": "/nonexistent"})
    assert opened.storage == callers and STORE_VARIABLE not in opened.environ


@pytest.mark.parametrize(
    "base", [{**OWN, "AWS_ENDPOINT_URL_S3": "http://a.test", "AWS_PROFILE": "p", "AWS_CA_BUNDLE": "x"}, {}]
)
def test_the_stacks_cluster_gets_no_store_settings_of_the_user_who_started_it(
    base: Mapping[str, str], stack: Stack
) -> None:
    found = {name: value for name, value in service_environment("ray", stack.settings, base).items() if "AWS_" in name}

    assert set(found) == {
        *("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        *("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    assert found["AWS_ENDPOINT_URL"] == stack.endpoint and found["AWS_ACCESS_KEY_ID"] == "STACKKEY"
