"""The store settings that are sent to a job, and the error if they do not arrive."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.cluster import job_store
from jobs.cluster.session import Session
from jobs.cluster.store_choice import STORE_VARIABLE
from jobs.errors import ClusterError
from pipeline.errors import StorageError
from pipeline.store.storage import Storage

OWN = Storage("http://a.test", "KEY", "a-secret", "token")


@dataclass
class Head:
    """A cluster's head, as a job client sees it."""

    status: int = 200
    taken: dict[str, bytes] = field(default_factory=dict)

    def _do_request(self, method: str, path: str, *, data: bytes) -> Any:
        assert method == "PUT"
        self.taken[path] = data
        return SimpleNamespace(status_code=self.status)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.open({"CONVMAE_HOME": str(tmp_path), "RAY_ADDRESS": "http://10.0.0.1:8265"})


def test_the_job_is_given_only_a_name_and_the_settings_are_sent_apart(session: Session) -> None:
    head = Head()
    told = job_store.send(replace(session, storage=OWN), head)
    again = job_store.send(replace(session, storage=OWN), head)

    assert told.keys() == {job_store.VARIABLE} and told != again
    assert "secret" not in str(told)
    content = head.taken[f"/api/packages/gcs/{told[job_store.VARIABLE]}"]
    assert Storage.from_json(json.loads(content)["store"]) == OWN


@pytest.mark.parametrize("storage", [Storage(), Storage(region="eu-west-1")])
def test_without_endpoint_and_keys_the_clusters_own_settings_are_used(session: Session, storage: Storage) -> None:
    head = Head()

    assert job_store.send(replace(session, storage=storage), head) == {} and not head.taken
    role = replace(session, storage=replace(storage, endpoint_url="http://a.test"))
    assert job_store.send(role, head).keys() == {job_store.VARIABLE}, "the endpoint is sent without keys, too"


def test_variables_of_trackers_and_webhooks_travel_beside_the_store_or_alone(session: Session) -> None:
    head = Head()
    shell = {"WANDB_API_KEY": "a-key", "MLFLOW_TRACKING_URI": "http://m", "CONVMAE_NOTIFY_URL": "http://h/token"}
    shells = replace(session, storage=Storage(), environ={**session.environ, **shell, "WANDB_MODE": "", "OTHER": "x"})

    told = job_store.send(shells, head)

    assert told.keys() == {job_store.VARIABLE}
    assert json.loads(head.taken[f"/api/packages/gcs/{told[job_store.VARIABLE]}"]) == {
        "store": None,
        "variables": shell,
    }


def test_a_job_has_the_variables_that_were_sent_and_a_store_only_if_one_was(tmp_path: Path) -> None:
    for store in (None, OWN.to_json()):
        program = tmp_path / "python"
        parcel = {"store": store, "variables": {"WANDB_API_KEY": "a-key"}}
        program.write_text(f"#!/bin/sh\necho '{json.dumps(parcel)}'\n")
        program.chmod(0o755)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(program))
            found = job_store.received({job_store.VARIABLE: "convmae-x.zip", "PATH": "/bin"})

        assert found["WANDB_API_KEY"] == "a-key"
        assert (STORE_VARIABLE in found) == (store is not None)
        assert store is None or Storage.from_json(json.loads(found[STORE_VARIABLE])) == OWN


def test_a_fault_is_reported_before_anything_is_sent(session: Session) -> None:
    head, fault = Head(), StorageError("AWS_PROFILE", "must name a profile", "gone", "correct it")

    with pytest.raises(StorageError, match=r"^AWS_PROFILE"):
        job_store.send(replace(session, storage=Storage(fault=fault)), head)
    assert not head.taken
    with pytest.raises(ClusterError, match=r"must take settings \(500\)"):
        job_store.send(replace(session, storage=OWN), Head(500))


def test_a_job_whose_parcel_is_gone_fails_with_one_line(tmp_path: Path) -> None:
    environ = {
        job_store.VARIABLE: "convmae-x.zip",
        "RAY_ADDRESS": "no address",
        "PATH": "/bin",
        "HOME": str(tmp_path),
    }
    supervisor = [sys.executable, "-m", "jobs.control.supervisor", "s3://bucket/runs/x"]

    ended = subprocess.run(supervisor, env=environ, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("failed: CONVMAE_STORE_PARCEL: must exist when the job starts")
    assert job_store.received({"A": "b"}) == {"A": "b"}
