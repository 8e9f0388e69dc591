"""The doctor's own measurements; tests of the main job run it on a real cluster."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from jobs.cluster.doctor import examine, measured_skew
from jobs.cluster.node_probe import NodeProbe
from jobs.cluster.session import Session
from jobs.cluster.store_check import store_findings
from pipeline.store.storage import Storage


class ForgetfulStorage(Storage):
    """A store that accepts every conditional write, as one that ignores the header does."""

    def create(self, url: str, data: bytes) -> bool:
        self.write(url, data)
        return True


def test_a_store_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    findings = list(store_findings(Storage(), str(tmp_path)))

    assert [finding.level for finding in findings] == ["ok"] * 4
    assert "conditional write" in findings[2].detail
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_ignores_conditions_is_found(tmp_path: Path) -> None:
    *_, last = store_findings(ForgetfulStorage(), str(tmp_path))

    assert last.level == "failed"
    assert "conditional write" in last.detail
    assert "If-None-Match" in last.remedy
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_store_is_a_finding_not_a_traceback() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    storage = Storage(endpoint_url=endpoint, key="key", secret="secret", region="us-east-1", retry_seconds=1.0)

    (finding,) = store_findings(storage, "s3://bucket/runs")

    assert finding.level == "failed"
    assert finding.remedy


@pytest.mark.parametrize("delays", [[0.5, 0.01, 0.3], [0.02, 0.02]])
def test_skew_is_taken_from_the_quickest_answer(delays: list[float]) -> None:
    now, asked = 1000.0, iter(delays)

    def there() -> float:
        nonlocal now
        delay = next(asked)
        now += 0.9 * delay  # asking takes longer than answering
        answer = now + 7.0
        now += 0.1 * delay
        return answer

    skew, uncertainty = measured_skew(there, lambda: now, readings=len(delays))

    assert uncertainty == pytest.approx(min(delays) / 2)
    assert abs(skew - 7.0) <= uncertainty


def test_facts_of_this_machine() -> None:
    facts = NodeProbe().facts(["/not/there/yet"])

    assert facts.host == socket.gethostname()
    assert facts.versions["torch"] != "-"
    assert [disk.folder for disk in facts.disks][1] == "/not/there/yet"
    assert all(disk.total_bytes > 0 for disk in facts.disks)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A session without a local stack and without a cluster."""
    yield Session.open({"CONVMAE_HOME": str(tmp_path / "home")})


def test_without_a_cluster_this_machine_is_examined(nowhere: Session, tmp_path: Path) -> None:
    findings = list(examine(nowhere, str(tmp_path / "runs"), [], wants_gpu=False))

    checks = [finding.check for finding in findings]
    assert checks.count("store") == 4
    assert {"cluster", "versions", "disk", "GPUs", "machine"} <= set(checks)
    assert next(finding for finding in findings if finding.check == "cluster").level == "skipped"
    assert not [finding for finding in findings if finding.level == "failed"]


@pytest.mark.slow
def test_two_processes_add_up_over_gloo() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        asked = [processes.submit(NodeProbe().reduce, "gloo", meeting, rank, 2, 240.0) for rank in range(2)]
        assert all(answer.result() > 0 for answer in asked)
