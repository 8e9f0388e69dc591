"""docs/cluster.md: its numbers follow from the recipe, its files exist, its policies allow no more than they say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from iam_policy import Call, Policy
from manifests import INFRA, ROOT, documents

from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.plan import IMAGENET, recipe_json
from pipeline.access.s3_options import VARIABLES

GUIDE = (ROOT / "docs" / "cluster.md").read_text()
PRICE = 55


NVLINK, EFA, ENA = 225e9, 200e9, 6.25e9
"""Bytes per second: half of 450 GB/s per GPU, of 32 cards of 100 Gbit/s per node, and of one card."""


def test_the_sizing_tables_follow_from_the_recipe() -> None:
    recipe = named_recipe("convmae_base")
    plan: Any = recipe_json(recipe, IMAGENET)
    epochs_images = plan["total_steps"] * recipe.global_batch_size
    rows = re.findall(r"^\| (\d) \| (\d+) \| (.+) \|$", GUIDE, flags=re.MULTILINE)
    links = [NVLINK, EFA, EFA, EFA, ENA, ENA, ENA]
    assert [int(nodes) for nodes, *_ in rows] == [1, 2, 4, 8, 2, 4, 8]
    for (nodes, gpus, cells), link in zip(rows, links, strict=True):
        count = int(gpus)
        images = recipe.global_batch_size // count
        compute = images * plan["training_flops_per_image"] / (989e12 * 0.2)
        reduce = 2 * plan["parameters"] * 4 * (count - 1) / count / link
        speed = recipe.global_batch_size / (compute + reduce)
        hours = epochs_images / speed / 3600
        wanted = [images, compute * 1e3, reduce * 1e3, speed, hours, hours * int(nodes), hours * int(nodes) * PRICE]
        told = [float(cell.replace(",", "")) for cell in cells.split(" | ")]
        assert told == pytest.approx(wanted, rel=0.03, abs=0.5)


def test_the_cards_on_which_the_first_table_relies_are_in_the_files() -> None:
    (cluster,) = documents("kuberay/raycluster.yaml")
    gpu_groups = [group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"].startswith("gpu-")]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in gpu_groups]
    (on_machines,) = documents("ray-up/aws.yaml")
    types = [kind for name, kind in on_machines["available_node_types"].items() if name.startswith("gpu-")]

    counted = {int(each["vpc.amazonaws.com/efa"]) for each in limits}
    for kind in types:
        cards = kind["node_config"]["NetworkInterfaces"]
        counted.add(sum(card["InterfaceType"].startswith("efa") for card in cards))
    assert {cards * 100e9 / 8 / 2 for cards in counted} == {EFA}


def test_files_that_the_guide_names_exist() -> None:
    named = set(re.findall(r"infra/[\w./-]+\.(?:ya?ml|json|sh)|infra/docker/Dockerfile", GUIDE))

    assert len(named) >= 8
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("name", "written", "read"), [("run", "runs", ("datasets",)), ("ingest", "datasets", ("sources",))]
)
def test_a_policy_writes_below_one_prefix_only(name: str, written: str, read: tuple[str, ...]) -> None:
    """That it suffices is shown by tests/jobs/control/test_iam_policies.py."""
    policy = Policy(INFRA / "iam" / f"{name}.json", BUCKET="mine")

    def allowed(method: str, path: str, query: str = "", **options: bool) -> bool:
        return all(policy.granting(need) for need in Call.of(method, path, query).needs(**options))

    prefixes = ("datasets", "runs", "sources", "other")
    writes = (
        ("PUT", ""),
        ("DELETE", ""),
        ("POST", "uploads"),
        ("PUT", "partNumber=1&uploadId=x"),
        ("DELETE", "uploadId=x"),
    )
    for prefix in prefixes:
        for method, query in writes:
            assert allowed(method, f"/mine/{prefix}/x", query) == (prefix == written), (method, prefix)
        for query in ("", "list-type=2"):
            path = "/mine" if query else f"/mine/{prefix}/x"
            listed = f"{query}&prefix={prefix}/x/" if query else ""
            assert allowed("GET", path, listed) == (prefix in (written, *read)), (prefix, query)
        assert allowed("HEAD", f"/mine/{prefix}/x", is_missing=True) == (prefix in (written, *read))
    assert not allowed("GET", "/mine", "list-type=2&prefix=")
    assert not allowed("GET", "/mine", "list-type=2")
    assert not allowed("GET", f"/another/{written}/x")
    assert {grant.action.partition(":")[0] for grant in policy.grants} == {"s3"}


def test_kms_rights_are_for_one_key_and_no_more_than_reading_and_writing_need() -> None:
    (statement,) = json.loads((INFRA / "iam" / "kms.json").read_text())["Statement"]

    assert statement["Resource"] == "arn:aws:kms:REGION:ACCOUNT:key/KEY"
    assert sorted(statement["Action"]) == ["kms:Decrypt", "kms:GenerateDataKey"]


def test_the_guide_names_exactly_the_s3_options_that_exist() -> None:
    options = (ROOT / "docs" / "datasets.md").read_text().partition("### Options of S3")[2].partition("## ")[0]

    assert set(re.findall(r"^\| `(CONVMAE_S3_\w+)`", options, flags=re.MULTILINE)) == set(VARIABLES)
    assert "CONVMAE_S3_KMS_KEY_ID" in GUIDE
