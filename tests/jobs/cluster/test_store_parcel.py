"""What comes to a job besides its command line, and what is told where it does not come."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.cluster import store_parcel
from jobs.cluster.session import Session
from jobs.errors import ClusterError
from pipeline.errors import StorageError
from pipeline.store.storage import Storage

OWN = Storage("http://a.test", "KEY", "a-secret", "token")


@dataclass
class Head:
    """Of a cluster, as a client of its jobs sees it."""

    status: int = 200
    taken: dict[str, bytes] = field(default_factory=dict)

    def _do_request(self, method: str, path: str, *, data: bytes) -> Any:
        assert method == "PUT"
        self.taken[path] = data
        return SimpleNamespace(status_code=self.status)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.open({"CONVMAE_HOME": str(tmp_path), "RAY_ADDRESS": "http://10.0.0.1:8265"})


def test_the_job_is_told_a_name_and_the_store_goes_another_way(session: Session) -> None:
    head = Head()
    told = store_parcel.send(replace(session, storage=OWN), head)
    again = store_parcel.send(replace(session, storage=OWN), head)

    assert told.keys() == {store_parcel.VARIABLE} and told != again
    assert "secret" not in str(told)
    content = head.taken[f"/api/packages/gcs/{told[store_parcel.VARIABLE]}"]
    assert Storage.from_json(json.loads(content)) == OWN


@pytest.mark.parametrize("storage", [Storage(), Storage(region="eu-west-1")])
def test_who_has_neither_endpoint_nor_keys_leaves_all_to_the_cluster(session: Session, storage: Storage) -> None:
    head = Head()

    assert store_parcel.send(replace(session, storage=storage), head) == {} and not head.taken
    role = replace(session, storage=replace(storage, endpoint_url="http://a.test"))
    assert store_parcel.send(role, head).keys() == {store_parcel.VARIABLE}, "the endpoint goes without keys, too"


def test_a_fault_is_told_before_anything_is_sent(session: Session) -> None:
    head, fault = Head(), StorageError("AWS_PROFILE", "must name a profile", "gone", "correct it")

    with pytest.raises(StorageError, match=r"^AWS_PROFILE"):
        store_parcel.send(replace(session, storage=Storage(fault=fault)), head)
    assert not head.taken
    with pytest.raises(ClusterError, match=r"must take settings \(500\)"):
        store_parcel.send(replace(session, storage=OWN), Head(500))


def test_a_job_whose_parcel_is_gone_ends_in_one_line(tmp_path: Path) -> None:
    environ = {
        store_parcel.VARIABLE: "convmae-x.zip",
        "RAY_ADDRESS": "no address",
        "PATH": "/bin",
        "HOME": str(tmp_path),
    }
    supervisor = [sys.executable, "-m", "jobs.control.supervisor", "s3://bucket/runs/x"]

    ended = subprocess.run(supervisor, env=environ, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("failed: CONVMAE_STORE_PARCEL: must be there for the job")
    assert store_parcel.received({"A": "b"}) == {"A": "b"}
