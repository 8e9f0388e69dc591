"""docs/cluster.md: its numbers follow from the recipe, its files exist, its policies allow no more than they say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from manifests import INFRA, ROOT

from jobs.plan import IMAGENET, recipe_json
from jobs.recipes import named_recipe

GUIDE = (ROOT / "docs" / "cluster.md").read_text()
PRICE = 55


def test_the_sizing_table_follows_from_the_recipe() -> None:
    recipe = named_recipe("convmae_base")
    plan: Any = recipe_json(recipe, IMAGENET)
    epochs_images = plan["total_steps"] * recipe.global_batch_size
    rows = re.findall(r"^\| (\d) \| (\d+) \| (.+) \|$", GUIDE, flags=re.MULTILINE)
    assert [int(nodes) for nodes, *_ in rows] == [1, 2, 4, 8]
    for nodes, gpus, cells in rows:
        count = int(gpus)
        images = recipe.global_batch_size // count
        compute = images * plan["training_flops_per_image"] / (989e12 * 0.2)
        link = 225e9 if nodes == "1" else 25e9
        reduce = 2 * plan["parameters"] * 2 * (count - 1) / count / link
        speed = recipe.global_batch_size / (compute + reduce)
        hours = epochs_images / speed / 3600
        wanted = [images, compute * 1e3, reduce * 1e3, speed, hours, hours * int(nodes), hours * int(nodes) * PRICE]
        told = [float(cell.replace(",", "")) for cell in cells.split(" | ")]
        assert told == pytest.approx(wanted, rel=0.03, abs=0.5)


def test_files_that_the_guide_names_exist() -> None:
    named = set(re.findall(r"infra/[\w./-]+\.(?:ya?ml|json)|infra/docker/Dockerfile", GUIDE))

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
