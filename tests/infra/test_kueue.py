"""Queues, and the run that waits in one, against the schemas of Kueue 0.19 and KubeRay 1.7, and Kueue's own rules."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from manifests import INFRA, changed, crd_errors, documents

from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.overrides import parse_overrides
from jobs.recipe.recipe import Recipe

SCHEMAS = {
    "ClusterQueue": "kueue/clusterqueues.v1beta2.json.gz",
    "LocalQueue": "kueue/localqueues.v1beta2.json.gz",
    "ResourceFlavor": "kueue/resourceflavors.v1beta2.json.gz",
    "WorkloadPriorityClass": "kueue/workloadpriorityclasses.v1beta2.json.gz",
    "RayJob": "kuberay/rayjobs.v1.json.gz",
}
UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def queues(kind: str) -> list[Any]:
    """The documents of one kind, in order."""
    return [document for document in documents("kuberay/queues.yaml") if document["kind"] == kind]


def job() -> Any:
    (found,) = documents("kuberay/queued-rayjob.yaml")
    return found


def cluster() -> Any:
    """The shared cluster, with which the job's own should agree."""
    (found,) = documents("kuberay/raycluster.yaml")
    return found


def errors(document: Any) -> list[str]:
    return crd_errors(SCHEMAS[document["kind"]], document)


@pytest.mark.parametrize("document", [*documents("kuberay/queues.yaml"), job()], ids=lambda document: document["kind"])
def test_a_resource_satisfies_its_definition(document: Any) -> None:
    assert errors(document) == []


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("ClusterQueue", ("spec", "queueingStrategy"), "Fair"),
        ("ClusterQueue", ("spec", "preemption", "withinClusterQueue"), "Always"),
        ("ClusterQueue", ("spec", "resourceGroups", 0, "flavor"), []),
        ("ClusterQueue", ("spec", "resourceGroups", 0, "flavors", 0, "resources", 0, "nominalQuota"), "many"),
        ("LocalQueue", ("spec", "clusterqueue"), "convmae"),
        ("ResourceFlavor", ("spec", "nodeLabels"), ["spot"]),
        ("WorkloadPriorityClass", ("value",), "high"),
    ],
)
def test_the_definition_detects_what_is_wrong(kind: str, place: tuple[Any, ...], value: Any) -> None:
    assert errors(changed(queues(kind)[0], place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "suspend"), "yes"),
        (("spec", "shutdownAfterJobFinished"), True),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "four"),
    ],
)
def test_kuberays_definition_detects_what_is_wrong_with_the_job(place: tuple[Any, ...], value: Any) -> None:
    assert errors(changed(job(), place, value))


def refusals(document: Any) -> list[str]:
    """Fields of a RayJob that Kueue would refuse: its rayjob_webhook.go, and ValidateCreate of raycluster/common.go.

    A job without a cluster of its own is not refused but skipped, with the same effect on whoever waits for a queue.
    """
    spec = document["spec"]
    if "clusterSelector" in spec:
        return ["clusterSelector"]
    found = [] if spec.get("shutdownAfterJobFinishes") else ["shutdownAfterJobFinishes"]
    own, annotations = spec["rayClusterSpec"], document["metadata"].get("annotations", {})
    if own.get("enableInTreeAutoscaling") and annotations.get("kueue.x-k8s.io/elastic-job") != "true":
        found.append("enableInTreeAutoscaling")
    groups = [group["groupName"] for group in own["workerGroupSpecs"]]
    return found + ["groupName"] * ("head" in groups) + ["workerGroupSpecs"] * (len(groups) > 17)


def test_kueue_would_manage_the_job() -> None:
    assert refusals(job()) == []
    assert job()["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "clusterSelector"), {"ray.io/cluster": "convmae"}),
        (("spec", "shutdownAfterJobFinishes"), False),
        (("spec", "rayClusterSpec", "enableInTreeAutoscaling"), True),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "groupName"), "head"),
    ],
)
def test_the_rules_of_kueue_find_what_it_would_refuse(place: tuple[str, ...], value: Any) -> None:
    assert refusals(changed(job(), place, value)) == [place[-1]]


def test_the_jobs_of_the_shared_cluster_carry_no_label_that_kueue_would_skip() -> None:
    for name in ("rayjob", "ingestjob", "raycluster"):
        (document,) = documents(f"kuberay/{name}.yaml")
        assert "kueue.x-k8s.io/queue-name" not in document["metadata"].get("labels", {})


def test_labels_name_queues_and_priorities_that_exist() -> None:
    labels, (local,), (queue,) = job()["metadata"]["labels"], queues("LocalQueue"), queues("ClusterQueue")

    assert labels["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["metadata"]["namespace"] == job()["metadata"]["namespace"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    selected = queue["spec"]["namespaceSelector"]["matchLabels"]
    assert selected == {"kubernetes.io/metadata.name": job()["metadata"]["namespace"]}
    names = [priority["metadata"]["name"] for priority in queues("WorkloadPriorityClass")]
    assert labels["kueue.x-k8s.io/priority-class"] in names and len(set(names)) == 2


def quantity(value: object) -> float:
    """A number of Kubernetes, in its own unit."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)(\w*)", str(value))
    assert matched, value
    return float(matched[1]) * UNITS[matched[2]]


def pods() -> list[tuple[int, Any]]:
    """How many, and their specification: the head's, and those of each group."""
    own = job()["spec"]["rayClusterSpec"]
    groups = [(group["replicas"], group["template"]["spec"]) for group in own["workerGroupSpecs"]]
    return [(1, own["headGroupSpec"]["template"]["spec"]), *groups]


def quotas() -> dict[str, dict[str, float]]:
    """Of each flavor, by resource."""
    (queue,) = queues("ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]
    return {
        flavor["name"]: {each["name"]: quantity(each["nominalQuota"]) for each in flavor["resources"]}
        for flavor in group["flavors"]
    }


def fitting(asked: dict[str, float], selector: dict[str, str]) -> list[str]:
    """Flavors whose labels a pod's node selector allows and whose quota suffices."""
    labels = {flavor["metadata"]["name"]: flavor["spec"]["nodeLabels"] for flavor in queues("ResourceFlavor")}
    return [
        name
        for name, quota in quotas().items()
        if all(labels[name].get(key, value) == value for key, value in selector.items())
        and all(amount <= quota.get(resource, 0) for resource, amount in asked.items())
    ]


def asked_by(count: int, pod: Any) -> dict[str, float]:
    (container,) = pod["containers"]
    return {name: count * quantity(value) for name, value in container["resources"]["requests"].items()}


def test_each_flavor_has_a_quota_for_every_resource_in_the_same_order() -> None:
    (queue,) = queues("ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]

    assert [list(quota) for quota in quotas().values()] == [group["coveredResources"]] * 2
    assert set(quotas()) == {flavor["metadata"]["name"] for flavor in queues("ResourceFlavor")}


def test_the_quotas_admit_head_and_workers() -> None:
    (head, *workers) = [(asked_by(count, pod), pod.get("nodeSelector", {})) for count, pod in pods()]

    assert fitting(*head) == ["on-demand"], "a head on a machine that may be taken back would end the run"
    assert all(fitting(*group) == ["spot", "on-demand"] for group in workers)
    both = {name: head[0].get(name, 0) + sum(group[0].get(name, 0) for group in workers) for name in workers[0][0]}
    assert fitting(both, head[1]) == ["on-demand"], "also where no spot machine is to be had"


def test_the_quotas_are_those_of_the_groups_of_the_shared_cluster() -> None:
    most = {group["groupName"]: group for group in cluster()["spec"]["workerGroupSpecs"]}
    for flavor in ("on-demand", "spot"):
        group = most[f"gpu-{flavor}"]
        asked = asked_by(group["maxReplicas"], group["template"]["spec"])
        heads = asked_by(2, pods()[0][1]) if flavor == "on-demand" else {}
        assert quotas()[flavor] == {name: amount + heads.get(name, 0) for name, amount in asked.items()}


def test_flavors_are_the_kinds_of_machines_that_the_shared_cluster_knows() -> None:
    spec = cluster()["spec"]
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    known = [template["spec"]["nodeSelector"] for template in templates]

    assert all(flavor["spec"]["nodeLabels"] in known for flavor in queues("ResourceFlavor"))


def recipe() -> Recipe:
    words = shlex.split(job()["spec"]["entrypoint"])
    assert words[:2] == ["convmae", "pretrain"] and "--supervised" in words
    return named_recipe(words[2]).amended(parse_overrides([word for word in words if "=" in word]))


def test_the_run_fits_its_nodes_and_continues_on_fewer() -> None:
    (group,) = job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]

    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert recipe().max_workers == gpus * group["replicas"]
    assert recipe().min_workers < recipe().max_workers
    assert recipe().cpus_per_worker * gpus <= quantity(container["resources"]["requests"]["cpu"])
    assert recipe().checkpoint_interval == "auto", "whoever is preempted is not asked to save"


def without_placement(pod: Any) -> Any:
    """A pod without what says where it goes and how long it may take to end."""
    return {key: value for key, value in pod.items() if key not in ("nodeSelector", "terminationGracePeriodSeconds")}


def test_its_pods_are_those_of_the_shared_cluster() -> None:
    own, shared = job()["spec"]["rayClusterSpec"], cluster()["spec"]
    spot = next(group for group in shared["workerGroupSpecs"] if group["groupName"] == "gpu-spot")

    assert own["rayVersion"] == shared["rayVersion"] and own["authOptions"] == shared["authOptions"]
    assert own["headGroupSpec"] == shared["headGroupSpec"]
    (group,) = own["workerGroupSpecs"]
    assert without_placement(group["template"]["spec"]) == without_placement(spot["template"]["spec"])
    assert group["template"]["metadata"] == spot["template"]["metadata"]


def test_the_guide_installs_the_release_whose_schemas_are_tried() -> None:
    guide = (INFRA.parent / "docs" / "cluster.md").read_text()
    record = (INFRA.parent / "docs" / "decisions" / "0059-queues.md").read_text()
    (release,) = re.findall(r"kueue/releases/download/v([\d.]+)/", guide)

    assert f"Schemas of Kueue {release}'s" in record
