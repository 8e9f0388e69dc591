"""The Kubernetes files against the real schemas: KubeRay 1.7, Kubernetes 1.37, the Prometheus operator 0.93."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import INFRA, ROOT, changed, crd_errors, documents
from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

from jobs.cluster.fan_out import INGEST_RESOURCE
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.overrides import parse_overrides

SCHEMAS = {
    "RayCluster": "kuberay/rayclusters.v1.json.gz",
    "RayJob": "kuberay/rayjobs.v1.json.gz",
    "PodMonitor": "prometheus-operator/podmonitors.v1.json.gz",
    "PrometheusRule": "prometheus-operator/prometheusrules.v1.json.gz",
}
HEAD = ("spec", "headGroupSpec", "template", "spec")


GUIDE = (ROOT / "docs" / "cluster.md").read_text()


def resource(name: str) -> Any:
    if name == "prometheusrule":
        (command,) = re.findall(r"^ +\$ (.*kuberay/prometheusrule.yaml.*) \| kubectl apply -f -$", GUIDE, re.MULTILINE)
        made = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
        return yaml.safe_load(made.stdout)
    (found,) = documents(f"kuberay/{name}.yaml")
    return found


def errors(document: Any) -> list[str]:
    return crd_errors(SCHEMAS[document["kind"]], document)


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "ingestjob", "podmonitor", "prometheusrule"])
def test_a_custom_resource_satisfies_its_definition(name: str) -> None:
    assert errors(resource(name)) == []


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("raycluster", ("spec", "headGroupSpecs"), {}),
        ("raycluster", ("spec", "enableInTreeAutoscaling"), "yes"),
        ("raycluster", ("spec", "authOptions", "mode"), "password"),
        ("raycluster", ("spec", "workerGroupSpecs", 1, "maxReplica"), 3),
        ("raycluster", ("spec", "workerGroupSpecs", 0, "minReplicas"), "one"),
        ("raycluster", ("spec", "gcsFaultToleranceOptions", "redis"), "x"),
        ("raycluster", (*HEAD, "terminationGracePeriod"), 600),
        ("raycluster", (*HEAD, "containers", 0, "resources", "limits", "memory"), "sixteen"),
        ("raycluster", (*HEAD, "volumes", 0, "emptyDir", "mediums"), "Memory"),
        ("rayjob", ("spec", "entryPoint"), "convmae"),
        ("rayjob", ("spec", "clusterSelector"), "convmae"),
        ("ingestjob", ("spec", "entrypointResources"), {"ingest": 0.01}),
        ("raycluster", ("spec", "workerGroupSpecs", 2, "resources", "CPU"), 0),
        ("podmonitor", ("spec", "podMetricsEndpoints", 0, "interval"), "often"),
        ("podmonitor", ("spec", "podMetricsEndpoint"), []),
        ("prometheusrule", ("spec", "groups", 0, "rules", 0, "expression"), "up"),
        ("prometheusrule", ("spec", "groups", 0, "rules", 0, "for"), "a while"),
    ],
)
def test_the_definition_detects_what_is_wrong(name: str, place: tuple[Any, ...], value: Any) -> None:
    assert errors(changed(resource(name), place, value))


@pytest.mark.parametrize("document", documents("kuberay/redis.yaml"), ids=lambda document: document["kind"])
def test_plain_resources_are_those_of_kubernetes(document: Any) -> None:
    kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize(
    ("number", "place", "value"),
    [
        (0, ("spec", "ports", 0, "port"), "redis"),
        (1, ("spec", "template", "spec", "containers", 0, "livenessprobe"), {}),
        (1, ("spec", "replicas"), "one"),
    ],
)
def test_kubernetes_detects_what_is_wrong(number: int, place: tuple[Any, ...], value: Any) -> None:
    document = changed(documents("kuberay/redis.yaml")[number], place, value)

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.37", strict=True)


def pods() -> list[Any]:
    """Specifications of all pods of the cluster."""
    spec = resource("raycluster")["spec"]
    return [
        spec["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in spec["workerGroupSpecs"]),
    ]


def test_the_cluster_runs_the_pinned_versions() -> None:
    cluster, image = resource("raycluster"), f"convmae-pretrain:{version('convmae-pretrain')}"

    assert cluster["spec"]["rayVersion"] == version("ray")
    assert all(container["image"].endswith(f"/{image}") for pod in pods() for container in pod["containers"])
    assert image in (INFRA / "ray-up" / "aws.yaml").read_text()
    assert image in (INFRA / "compose" / "compose.yml").read_text()


def test_no_pod_runs_as_root_and_all_run_as_the_images_user() -> None:
    (user,) = re.findall(r"^USER (\d+)$", (INFRA / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE)
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == int(user)
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def groups() -> dict[str, Any]:
    """The groups of workers, by name."""
    return {group["groupName"]: group for group in resource("raycluster")["spec"]["workerGroupSpecs"]}


def gpu_groups() -> list[Any]:
    """Those that train."""
    return [group for name, group in groups().items() if name.startswith("gpu-")]


def test_spot_and_on_demand_groups_have_shared_memory_and_time_to_save() -> None:
    assert set(groups()) == {"gpu-on-demand", "gpu-spot", "cpu-ingest"}
    assert groups()["gpu-on-demand"]["minReplicas"] >= 1  # a run continues when the spot market is empty
    assert groups()["gpu-spot"]["minReplicas"] == 0
    assert groups()["gpu-spot"]["template"]["spec"]["terminationGracePeriodSeconds"] < 120  # the notice that AWS gives
    for pod in pods():
        memory = next(volume for volume in pod["volumes"] if volume["name"] == "shared-memory")
        assert memory["emptyDir"]["medium"] == "Memory"
        assert any(mount["mountPath"] == "/dev/shm" for mount in pod["containers"][0]["volumeMounts"])


def test_gpu_nodes_are_given_all_cards_for_efa_and_what_libfabric_needs() -> None:
    script = (INFRA / "kuberay" / "efa-node.sh").read_text()
    (pages,) = re.findall(r"vm.nr_hugepages = (\d+)", script)
    for group in gpu_groups():
        (container,) = group["template"]["spec"]["containers"]
        wanted, most = container["resources"]["requests"], container["resources"]["limits"]
        for name in ("vpc.amazonaws.com/efa", "hugepages-2Mi"):  # Kubernetes requires both to be equal
            assert wanted[name] == most[name]
        assert most["vpc.amazonaws.com/efa"] == 32  # as many as a p5.48xlarge has
        assert int(most["hugepages-2Mi"].removesuffix("Mi")) <= 2 * int(pages)
        assert {"name": "FI_PROVIDER", "value": "efa"} in container["env"]
    for pod in (resource("raycluster")["spec"]["headGroupSpec"], groups()["cpu-ingest"]):
        assert "vpc.amazonaws.com/efa" not in str(pod)


def test_what_efa_needs_of_a_host_is_written_and_applied(tmp_path: Path) -> None:
    """User data, run in another root with stand-ins that record how they were called."""
    (tmp_path / "bin").mkdir()
    for name in ("sysctl", "systemctl"):
        stand_in = tmp_path / "bin" / name
        stand_in.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n')
        stand_in.chmod(0o755)
    root = tmp_path / "root"
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "ROOT": str(root)}

    for _ in range(2):
        subprocess.run(["sh", str(INFRA / "kuberay" / "efa-node.sh")], env=environment, check=True)

    written = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
    assert written == {
        "etc/sysctl.d/90-efa-hugepages.conf": "vm.nr_hugepages = 5128\n",
        "etc/systemd/system/containerd.service.d/90-efa-memlock.conf": "[Service]\nLimitMEMLOCK=infinity\n",
    }
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == calls[:3] * 2
    assert calls[1:3] == ["systemctl daemon-reload", "systemctl try-restart containerd"]
    assert calls[0].startswith("sysctl --load ") and calls[0].endswith("90-efa-hugepages.conf")


def test_rays_autoscaler_adds_a_node_for_an_ingest_only_from_the_cpu_group() -> None:
    """With the code by which Ray's autoscaler reads the cluster's specification."""
    types = _generate_available_node_types_from_ray_cr_spec(resource("raycluster")["spec"])
    job = resource("ingestjob")["spec"]
    asked = json.loads(job["entrypointResources"])

    assert set(asked) == {INGEST_RESOURCE} and job["entrypointNumCpus"] == 0
    offers = {name: kind["resources"].get(INGEST_RESOURCE, 0) for name, kind in types.items()}
    assert {name for name, offered in offers.items() if offered >= 1 + asked[INGEST_RESOURCE]} == {"cpu-ingest"}
    assert types["cpu-ingest"]["resources"]["CPU"] == 0, "nothing else goes there: its account may not write to runs/"
    assert "GPU" not in types["cpu-ingest"]["resources"]
    assert (types["cpu-ingest"]["min_workers"], types["cpu-ingest"]["max_workers"]) == (0, 8)
    assert all(types[group["groupName"]]["resources"]["GPU"] == 8 for group in gpu_groups())


def test_ingests_and_runs_have_accounts_of_their_own() -> None:
    accounts = {name: group["template"]["spec"]["serviceAccountName"] for name, group in groups().items()}

    assert accounts == {"gpu-on-demand": "convmae", "gpu-spot": "convmae", "cpu-ingest": "convmae-ingest"}
    for account, policy in (("convmae", "run"), ("convmae-ingest", "ingest")):
        assert re.search(rf"--name {account} \\\n +--attach-policy-arn \S+:policy/convmae-{policy} ", GUIDE)
        assert (INFRA / "iam" / f"{policy}.json").exists()


def test_the_ingest_job_runs_a_command_of_ours_on_the_existing_cluster() -> None:
    job = resource("ingestjob")["spec"]
    command, *places = shlex.split(job["entrypoint"])[1:]

    assert shlex.split(job["entrypoint"])[0] == "convmae" and command == "shard"
    assert [place.partition("BUCKET/")[2].partition("/")[0] for place in places] == ["sources", "datasets"]
    assert job["clusterSelector"]["ray.io/cluster"] == resource("raycluster")["metadata"]["name"]


def test_the_job_runs_a_recipe_that_fits_the_cluster() -> None:
    words = shlex.split(resource("rayjob")["spec"]["entrypoint"])
    overrides = parse_overrides([word for word in words if "=" in word])
    recipe = named_recipe(words[2]).amended(overrides)
    gpus = [
        (group["minReplicas"] * limits["nvidia.com/gpu"], group["maxReplicas"] * limits["nvidia.com/gpu"])
        for group in gpu_groups()
        for limits in [group["template"]["spec"]["containers"][0]["resources"]["limits"]]
    ]

    assert words[:2] == ["convmae", "pretrain"]
    assert "--supervised" in words, "a driver that is killed is started again"
    assert recipe.min_workers <= sum(least for least, _ in gpus)
    assert recipe.max_workers <= sum(most for _, most in gpus)
    cpus = int(gpu_groups()[0]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert recipe.cpus_per_worker * 8 <= cpus
    ports = {port["name"]: port["containerPort"] for port in pods()[0]["containers"][0]["ports"]}
    assert recipe.metrics_port == ports["convmae"]
    assert resource("rayjob")["spec"]["clusterSelector"]["ray.io/cluster"] == resource("raycluster")["metadata"]["name"]


def test_the_clusters_rules_are_the_same_as_elsewhere() -> None:
    rules = yaml.safe_load((INFRA / "prometheus" / "convmae.rules.yml").read_text())

    assert resource("prometheusrule")["spec"] == rules
    assert resource("prometheusrule")["metadata"]["labels"] == resource("podmonitor")["metadata"]["labels"]


def test_a_run_keeps_its_series_when_its_head_is_replaced() -> None:
    (endpoint,) = (end for end in resource("podmonitor")["spec"]["podMetricsEndpoints"] if end["port"] == "convmae")
    replaced = {relabeling["targetLabel"]: relabeling for relabeling in endpoint["relabelings"]}

    assert replaced["instance"]["sourceLabels"] == ["__meta_kubernetes_pod_label_ray_io_cluster"]


def test_the_monitor_selects_pods_and_ports_that_exist() -> None:
    monitor, cluster = resource("podmonitor"), resource("raycluster")["spec"]
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    for template in templates:
        assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"] for pod in pods() for container in pod["containers"] for port in container["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
