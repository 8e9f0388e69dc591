"""docs/cluster.md: its numbers follow from the recipe, its files exist, its policies allow no more than they say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from manifests import INFRA, ROOT, documents

from jobs.plan import IMAGENET, recipe_json
from jobs.recipes import named_recipe

GUIDE = (ROOT / "docs" / "cluster.md").read_text()
PRICE = 55


NVLINK, EFA, ENA = 225e9, 200e9, 6.25e9
"""Bytes a second: half of 450 GB/s a GPU, of 32 cards of 100 Gbit/s a node, of one."""


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
        reduce = 2 * plan["parameters"] * 2 * (count - 1) / count / link
        speed = recipe.global_batch_size / (compute + reduce)
        hours = epochs_images / speed / 3600
        wanted = [images, compute * 1e3, reduce * 1e3, speed, hours, hours * int(nodes), hours * int(nodes) * PRICE]
        told = [float(cell.replace(",", "")) for cell in cells.split(" | ")]
        assert told == pytest.approx(wanted, rel=0.03, abs=0.5)


def test_the_cards_that_the_first_table_rests_on_are_in_the_files() -> None:
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
    ("name", "written", "read"), [("run", "runs/*", "datasets/*"), ("ingest", "datasets/*", "sources/*")]
)
def test_a_policy_writes_below_one_prefix_only(name: str, written: str, read: str) -> None:
    policy = json.loads((INFRA / "iam" / f"{name}.json").read_text())
    allowed: dict[str, set[str]] = {}
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        allowed.setdefault(statement["Resource"].removeprefix("arn:aws:s3:::BUCKET").lstrip("/"), set()).update(actions)

    assert allowed[""] == {"s3:ListBucket"}
    assert allowed[read] == {"s3:GetObject"}
    assert allowed[written] == {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    assert set(allowed) == {"", read, written}
    assert all("*" not in action for actions in allowed.values() for action in actions)
