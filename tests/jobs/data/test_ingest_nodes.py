"""Nodes that are reserved for ingests: an ingest uses them and no other, and nothing else uses them."""

from __future__ import annotations

import json
import shlex
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import INFRA
from ray_nodes import RAY, Cluster, ray_cluster
from testbed import TILES

from jobs.cluster import fan_out
from jobs.cluster.fan_out import COPIES_PER_NODE, INGEST_RESOURCE, TASKS_PER_CPU
from jobs.cluster.session import Session
from jobs.remote.command import RESOURCES_VARIABLE, entrypoint_resources, job_of_command
from pipeline.errors import UserError
from pipeline.ingest.photographs import cut_tiles
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

HEAD_ID, GPU_ID = "a" * 56, "b" * 56
HEAD = {"NodeID": HEAD_ID, "Alive": True, "Resources": {}}
GPU = {"NodeID": GPU_ID, "Alive": True, "Resources": {"CPU": 88.0, "GPU": 8.0}}
INGEST = {"NodeID": "ingest", "Alive": True, "Resources": {INGEST_RESOURCE: 15.0}}
GONE = {"NodeID": "gone", "Alive": False, "Resources": {INGEST_RESOURCE: 15.0}}


def given(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, Any]) -> None:
    """Such a cluster."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    names = {name for resources in alive for name in resources}
    totals = {name: sum(resources.get(name, 0.0) for resources in alive) for name in names}
    monkeypatch.setattr("ray.nodes", lambda: list(nodes))
    monkeypatch.setattr("ray.cluster_resources", lambda: totals)


@pytest.mark.parametrize(
    ("nodes", "needs", "width"),
    [
        ((HEAD, GPU), {"num_cpus": 1}, 88 * TASKS_PER_CPU),
        ((HEAD, GPU, GONE), {"num_cpus": 1}, 88 * TASKS_PER_CPU),
        ((HEAD, GPU, INGEST), {"num_cpus": 0, "resources": {INGEST_RESOURCE: 1}}, 15 * TASKS_PER_CPU),
        ((HEAD,), {"num_cpus": 1}, TASKS_PER_CPU),
    ],
    ids=["none", "gone", "one", "no CPU"],
)
def test_tasks_take_what_nodes_for_ingests_offer_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, nodes: tuple[dict[str, Any], ...], needs: dict[str, Any], width: int
) -> None:
    given(monkeypatch, *nodes)

    assert fan_out.task_needs() == needs
    assert fan_out.task_limit(copying=False) == width


def test_what_copies_goes_to_all_nodes_but_those(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, HEAD, GPU)
    assert next(fan_out.copying_places())["scheduling_strategy"] == "SPREAD"

    given(monkeypatch, HEAD, GPU, INGEST, GONE)
    places = fan_out.copying_places()
    chosen = [next(places)["scheduling_strategy"].node_id for _ in range(4)]
    assert chosen == [HEAD_ID, GPU_ID, HEAD_ID, GPU_ID]
    assert fan_out.task_limit(copying=True) == 2 * COPIES_PER_NODE


@pytest.mark.parametrize(("text", "wanted"), [("", {}), ('{"ingest": 0.01}', {"ingest": 0.01}), ('{"a": 2}', {"a": 2})])
def test_the_job_of_a_command_asks_for_what_its_user_says(text: str, wanted: dict[str, float]) -> None:
    assert entrypoint_resources(text) == wanted


def test_a_command_from_elsewhere_is_a_job_that_asks_for_it(tmp_path: Path) -> None:
    variables = {"RAY_ADDRESS": "http://10.0.0.1:8265", RESOURCES_VARIABLE: '{"ingest": 0.01}'}
    session = Session(variables, tmp_path, None, Storage())

    assert job_of_command(session, ["verify", "s3://b/data"], {}, "")["entrypoint_resources"] == {"ingest": 0.01}


@pytest.mark.parametrize("text", ["ingest", "[1]", '{"ingest": "much"}', '{"ingest": null}', "3"])
def test_what_is_not_an_object_of_amounts_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="CONVMAE_COMMAND_RESOURCES: must be a JSON object"):
        entrypoint_resources(text)


def answer_of(cluster: Cluster, path: str) -> Any:
    """What the dashboard answers."""
    headers = {"Authorization": f"Bearer {(cluster.folder / 'token').read_text()}"}
    request = urllib.request.Request(f"http://127.0.0.1:{cluster.ports['dashboard']}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def tasks_by_node(cluster: Cluster, name: str) -> set[str]:
    """Ids of the nodes on which tasks of a name ran."""
    query = "limit=1000&detail=1&filter_keys=name&filter_predicates=%3D&filter_values=" + name
    tasks = answer_of(cluster, f"/api/v0/tasks?{query}")["data"]["result"]["result"]
    assert tasks, name
    return {task["node_id"] for task in tasks}


def jobs_by_node(cluster: Cluster) -> dict[str, str]:
    """Id of the node on which each job's own process ran, by what was submitted."""
    jobs = [job for job in answer_of(cluster, "/api/jobs/") if job["type"] == "SUBMISSION"]
    return {job["entrypoint"]: job["driver_node_id"] for job in jobs}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ingest_job_of_the_manifest_runs_on_a_node_of_its_group(tmp_path: Path) -> None:
    (manifest,) = yaml.safe_load_all((INFRA / "kuberay" / "ingestjob.yaml").read_text())
    (raycluster,) = yaml.safe_load_all((INFRA / "kuberay" / "raycluster.yaml").read_text())
    job = manifest["spec"]
    offered = next(group["resources"] for group in raycluster["spec"]["workerGroupSpecs"] if "resources" in group)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    cut_tiles(photographs, TILES, seed=0)
    (tmp_path / "cluster").mkdir()

    with ray_cluster(tmp_path / "cluster") as cluster:
        cluster.add(cpus=2)  # which a run would train on
        mine = json.dumps({name: float(amount) for name, amount in offered.items() if name != "CPU"})
        ingests = cluster.add(int(offered["CPU"]), f"--resources={mine}")
        url = f"{cluster.s3.url}/datasets/imagenet"
        words = [*shlex.split(job["entrypoint"])[:2], str(photographs), url, "--samples-per-shard", "8"]
        submit = [
            *RAY,
            "job",
            "submit",
            f"--address=http://127.0.0.1:{cluster.ports['dashboard']}",
            f"--entrypoint-num-cpus={job['entrypointNumCpus']}",
            f"--entrypoint-resources={job['entrypointResources']}",
            "--",
        ]
        for command in (words, ["convmae", "verify", url]):
            ended: Any = subprocess.run(
                [*submit, *command], env=cluster.environment(), capture_output=True, text=True, check=False, timeout=600
            )
            assert ended.returncode == 0, ended.stdout + ended.stderr

        assert Manifest.load(cluster.s3.storage, url).samples == TILES
        for name in ("write_shard", "_verified"):
            assert tasks_by_node(cluster, name) == {ingests.node_id}
        jobs = jobs_by_node(cluster)
        assert len(jobs) == 2 and set(jobs.values()) == {ingests.node_id}
