"""The file for SkyPilot against its own schema, and its commands on each node with stand-ins for Ray and ours."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from manifests import SCHEMAS, changed, documents, schema_errors
from stand_ins import StandIns

from jobs.cluster.node_probe import RAY_SETTINGS
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.overrides import parse_overrides

IPS = "10.0.0.7\n10.0.0.8\n10.0.0.9"

RAY = """
if sys.argv[1] == "health-check":
    answers = (home / "head").read_text() if (home / "head").exists() else ""
    record(answers=answers)
    sys.exit(0 if answers == "up" else 1)
health = {name: value for name, value in os.environ.items() if name.startswith("RAY_health")}
record(health=health, mode=os.environ["RAY_AUTH_MODE"])
"""


def task() -> Any:
    (found,) = documents("skypilot/convmae.yaml")
    return found


def errors(document: Any) -> list[str]:
    return schema_errors(json.loads((SCHEMAS / "skypilot" / "task.json").read_text()), document)


def test_skypilots_own_schema_accepts_the_file() -> None:
    assert errors(task()) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("node_count",), 4),
        (("num_nodes",), "four"),
        (("resources", "gpus"), "H100:8"),
        (("resources", "use_spot"), "yes"),
        (("resources", "job_recovery", "max_restarts_on_errors"), -1),
        (("resources", "infra"), "nowhere/us-east-1"),
        (("envs", "a-name"), "x"),
        (("run",), ["convmae"]),
    ],
)
def test_skypilots_own_schema_detects_what_is_wrong(place: tuple[Any, ...], value: Any) -> None:
    assert errors(changed(task(), place, value))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[StandIns]:
    """Programs of a node."""
    stand_ins = StandIns(tmp_path / "home")
    installed = tmp_path / "home" / "convmae"
    installed.mkdir()
    (installed / "bin").symlink_to(stand_ins.folder)
    stand_ins.add("ray", RAY)
    stand_ins.add("convmae", 'record(address=os.environ["RAY_ADDRESS"])')
    stand_ins.add("sleep", "time.sleep(0.02)")
    yield stand_ins
    stand_ins.end()


def started(node: StandIns, rank: int) -> subprocess.Popen[str]:
    """The task's commands, as SkyPilot starts them on the node of that rank."""
    environment = {
        **{name: value for name, value in task()["envs"].items() if value is not None},
        "PATH": "/usr/bin:/bin",
        "HOME": str(node.home),
        "SKYPILOT_NODE_IPS": IPS,
        "SKYPILOT_NODE_RANK": str(rank),
        "RAY_AUTH_TOKEN": "token",
    }
    return node.started(["bash", "-c", task()["run"]], environment)


def test_the_first_node_has_the_head_and_the_run(node: StandIns) -> None:
    script = started(node, 0)
    _, complaints = script.communicate(timeout=20)

    assert script.returncode == 0, complaints
    head, run = node.calls()
    assert {"start", "--head", "--node-ip-address=10.0.0.7", "--port=6479"} <= set(head["arguments"])
    assert head["mode"] == "token"
    assert {name.removeprefix("RAY_"): int(value) for name, value in head["health"].items()} == RAY_SETTINGS
    assert run["address"] == "10.0.0.7:6479"
    command, recipe, supervised, flag, name, *fields = run["arguments"]
    assert (command, supervised, flag, name) == ("pretrain", "--supervised", "--run", task()["envs"]["RUN"])
    amended = named_recipe(recipe).amended(parse_overrides(fields))
    assert (amended.data, amended.run_root) == ("s3://BUCKET/datasets/imagenet", "s3://BUCKET/runs")
    accelerator, count = task()["resources"]["accelerators"].split(":")
    assert accelerator == "H100" and amended.max_workers == int(count) * task()["num_nodes"]


def test_the_ports_and_the_folder_are_not_those_of_skypilots_own_cluster() -> None:
    """Its constants.py: SKY_REMOTE_RAY_PORT, SKY_REMOTE_RAY_DASHBOARD_PORT, SKY_REMOTE_RAY_TEMPDIR."""
    for own in ("6380", "8266", "/tmp/ray_skypilot"):
        assert own not in task()["run"].replace("SkyPilot's, which has 6380", "")
    assert not [line for line in task()["run"].splitlines() if line.strip().startswith("ray stop")]


def test_a_worker_waits_for_the_head_and_stays_until_it_has_been_gone_for_a_while(node: StandIns) -> None:
    script = started(node, 1)
    node.wait_for(lambda: len(node.calls("ray")) >= 3)
    assert {tuple(call["arguments"]) for call in node.calls("ray")} == {("health-check", "--address", "10.0.0.7:6479")}
    (node.home / "head").write_text("up")
    node.wait_for(lambda: [call for call in node.calls("ray") if call["arguments"][0] == "start"])
    (start,) = [call for call in node.calls("ray") if call["arguments"][0] == "start"]
    assert "--address=10.0.0.7:6479" in start["arguments"] and "--head" not in start["arguments"]

    (node.home / "head").write_text("away")
    seen = len(node.calls("ray"))
    node.wait_for(lambda: len(node.calls("ray")) > seen + 2)
    (node.home / "head").write_text("up")
    seen = len(node.calls("ray"))
    node.wait_for(lambda: len(node.calls("ray")) > seen + 8)
    assert script.poll() is None, "a head that answers again is no reason to leave"

    (node.home / "head").unlink()
    _, complaints = script.communicate(timeout=20)
    assert script.returncode == 0, complaints
    last = [call["answers"] for call in node.calls("ray")[-6:]]
    assert last == [""] * 6
    assert not node.calls("convmae")
