from __future__ import annotations

from typing import Any

import pytest
from manifests import changed, documents
from ray.autoscaler._private.util import prepare_config, validate_config


def cluster() -> Any:
    (found,) = documents("ray-up/aws.yaml")
    return found


def test_rays_own_validator_takes_the_cluster_file() -> None:
    validate_config(prepare_config(cluster()))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("cluster_names",), "convmae"),
        (("max_workers",), "eight"),
        (("head_node_type",), "heads"),
        (("docker", "images"), "x"),
        (("available_node_types", "gpu-spot", "min_worker"), 1),
    ],
)
def test_rays_own_validator_finds_what_is_wrong(place: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(Exception, match=r".+"):
        validate_config(prepare_config(changed(cluster(), place, value)))


def test_nodes_of_the_spot_market_are_marked_and_tokens_of_the_metadata_service_required() -> None:
    types = cluster()["available_node_types"]

    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in types["gpu-on-demand"]["node_config"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    for kind in types.values():
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])


def test_no_secret_is_in_the_file() -> None:
    options = " ".join(cluster()["docker"]["run_options"])

    assert "RAY_AUTH_TOKEN_PATH=" in options
    assert "RAY_AUTH_TOKEN=" not in options
    assert "AWS_SECRET" not in options
