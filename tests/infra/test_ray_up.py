from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from manifests import INFRA, changed, documents
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.cluster.fan_out import INGEST_RESOURCE


def cluster() -> Any:
    (found,) = documents("ray-up/aws.yaml")
    return found


def test_rays_own_validator_accepts_the_cluster_file() -> None:
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
def test_rays_own_validator_detects_what_is_wrong(place: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(Exception, match=r".+"):
        validate_config(prepare_config(changed(cluster(), place, value)))


def test_spot_nodes_are_marked_and_the_metadata_service_requires_tokens() -> None:
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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What Ray's own code requests from EC2, by node type; moto answers for instances but not for cards."""
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        ec2, iam = boto3.client("ec2"), boto3.client("iam")
        zones = {subnet["AvailabilityZone"]: subnet for subnet in ec2.describe_subnets()["Subnets"]}
        subnet = zones["us-east-1a"]
        names = {
            "ACCOUNT": "123456789012",
            "SUBNET": subnet["SubnetId"],
            "SECURITY_GROUP": ec2.create_security_group(
                GroupName="convmae", Description="convmae", VpcId=subnet["VpcId"]
            )["GroupId"],
            "DEEP_LEARNING_BASE_AMI": ec2.describe_images()["Images"][0]["ImageId"],
        }
        for role in ("head", "node", "ingest"):
            iam.create_instance_profile(InstanceProfileName=f"convmae-{role}")
        text = (INFRA / "ray-up" / "aws.yaml").read_text()
        for name, value in names.items():
            text = text.replace(name, value)
        config = bootstrap_aws(
            AWSNodeProvider.fillout_available_node_types_resources(prepare_config(yaml.safe_load(text)))
        )
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        found: dict[str, Any] = {"types": config["available_node_types"], "names": names}
        create = provider.ec2_fail_fast.create_instances
        for name, kind in config["available_node_types"].items():

            def noted(name: str = name, **request: Any) -> Any:
                found[name] = request
                return create(**request)

            monkeypatch.setattr(provider.ec2_fail_fast, "create_instances", noted)
            provider.create_node(copy.deepcopy(kind["node_config"]), {"ray-node-name": name}, 1)
        return found


@pytest.mark.parametrize("kind", ["gpu-on-demand", "gpu-spot"])
def test_gpu_nodes_are_requested_with_every_card_in_one_placement_group(asked: dict[str, Any], kind: str) -> None:
    request, names = asked[kind], asked["names"]
    cards = request["NetworkInterfaces"]

    assert request["InstanceType"] == "p5.48xlarge"
    assert request["Placement"] == {"GroupName": "convmae"}
    # AWS: IP on card 0, device 0; EFA on card 0, device 1, and on device 0 of each of the 31 others.
    places = [(card["NetworkCardIndex"], card["DeviceIndex"], card["InterfaceType"]) for card in cards]
    assert places == [(0, 0, "interface"), (0, 1, "efa-only"), *((card, 0, "efa-only") for card in range(1, 32))]
    assert {card["SubnetId"] for card in cards} == {names["SUBNET"]}
    assert all(card["Groups"] == [names["SECURITY_GROUP"]] for card in cards)
    assert "SecurityGroupIds" not in request, "EC2 refuses both"
    options = asked["types"][kind]["docker"]["worker_run_options"]
    assert {"--device /dev/infiniband", "--ulimit memlock=-1:-1", "--env FI_PROVIDER=efa"} <= set(options)


def test_the_other_nodes_are_in_the_same_security_group_and_have_no_device_for_efa(asked: dict[str, Any]) -> None:
    for kind in ("head", "cpu-ingest"):
        assert asked[kind]["SecurityGroupIds"] == [asked["names"]["SECURITY_GROUP"]]
        assert "docker" not in asked["types"][kind]


def test_ingests_have_nodes_and_a_role_of_their_own(asked: dict[str, Any]) -> None:
    resources = {name: kind["resources"] for name, kind in asked["types"].items()}

    assert [name for name, has in resources.items() if has.get(INGEST_RESOURCE)] == ["cpu-ingest"]
    assert resources["cpu-ingest"]["CPU"] == 0, "nothing else goes there: its role may not write to runs/"
    assert asked["types"]["cpu-ingest"]["min_workers"] == 0
    roles = {name: asked[name]["IamInstanceProfile"]["Arn"].rpartition("/")[2] for name in resources}
    gpus = {"gpu-on-demand": "convmae-node", "gpu-spot": "convmae-node"}
    assert roles == {"head": "convmae-head", "cpu-ingest": "convmae-ingest", **gpus}
