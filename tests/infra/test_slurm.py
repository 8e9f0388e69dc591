"""The script for Slurm, run as Slurm would run it, with stand-ins for Slurm's programs, for Ray and for our command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from manifests import INFRA
from stand_ins import StandIns

from jobs.cluster.address import ClusterAddress
from jobs.cluster.node_probe import RAY_SETTINGS
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.overrides import parse_overrides

SCRIPT = INFRA / "slurm" / "convmae.sbatch"
JOB = 9_990_000_000 + os.getpid()
FOLDER = Path(f"/tmp/convmae-{JOB}")
WORDS = ["convmae_base", "--run", "base-1", "data=s3://b/datasets/imagenet", "run_root=s3://b/runs"]

SRUN = """
end = next(i for i, word in enumerate(sys.argv[1:], 1) if not word.startswith("--"))
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:end])
nodes = options["nodelist"].split(",")
assert len(nodes) == int(options["nodes"]) == int(options["ntasks"]) and options["ntasks-per-node"] == "1"
record(options=options, command=sys.argv[end:])
tasks = [subprocess.Popen(sys.argv[end:], env={**os.environ, "NODE": node}) for node in nodes]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
codes = [task.wait() for task in tasks]
record(ended=sys.argv[end:end + 2], nodes=nodes)
sys.exit(max(abs(code) for code in codes))
"""
RAY = """
if sys.argv[1] == "health-check":
    sys.exit(0 if (home / "head-is-up").exists() else 1)
words = dict(word[2:].partition("=")[::2] for word in sys.argv[2:] if word.startswith("--"))
health = {name: value for name, value in os.environ.items() if name.startswith("RAY_health")}
limit = __import__("resource").getrlimit(__import__("resource").RLIMIT_NOFILE)
record(node=os.environ["NODE"], token=os.environ["RAY_AUTH_TOKEN"], mode=os.environ["RAY_AUTH_MODE"], health=health,
       limit=limit)
if "head" in words and (home / "head-fails").exists():
    sys.exit(1)
Path(words["temp-dir"], os.environ["NODE"]).mkdir(parents=True)
if "head" in words:
    (home / "head-is-up").touch()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    time.sleep(0.05)
"""
CONVMAE = """
record(address=os.environ["RAY_ADDRESS"], token=os.environ["RAY_AUTH_TOKEN"])

def stopped(*_):
    time.sleep(0.3)  # a save takes a while
    record(saved=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, stopped)
(home / "run-is-on").touch()
while not (home / "run-code").exists():
    time.sleep(0.05)
sys.exit(int((home / "run-code").read_text()))
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[StandIns]:
    """Programs of an allocation."""
    stand_ins = StandIns(tmp_path)
    stand_ins.add("srun", SRUN)
    stand_ins.add("ray", RAY)
    stand_ins.add("convmae", CONVMAE)
    stand_ins.add("hostname", 'print("10.0.0.7 172.17.0.1 ")')
    stand_ins.add("sleep", "time.sleep(0.05)")
    nodes = 'print(*[f"node{number}" for number in range(1, 4)][: int(os.environ["NODES"])], sep="\\n")'
    stand_ins.add("scontrol", f'record()\nif sys.argv[1] == "show":\n    {nodes}')
    yield stand_ins
    stand_ins.end()
    shutil.rmtree(FOLDER, ignore_errors=True)


def started(slurm: StandIns, *, nodes: int = 3, words: list[str] = WORDS, **environ: str) -> subprocess.Popen[str]:
    """The script, as the batch step of a job."""
    environment = {
        "PATH": f"{slurm.folder}:/usr/bin:/bin",
        "SLURM_JOB_ID": str(JOB),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_CPUS_PER_TASK": "88",
        "NODES": str(nodes),
        **environ,
    }
    command = ["bash", str(SCRIPT), *words]
    return slurm.started(command, environment)


def end_run(slurm: StandIns, code: str) -> None:
    """Have the stand-in of `convmae` end; it reads the file as soon as it is there."""
    new = slurm.home / "new-run-code"
    new.write_text(code)
    new.rename(slurm.home / "run-code")


def ended(script: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = script.communicate(timeout=20)
    return script.returncode, errors


def running(slurm: StandIns, **options: Any) -> subprocess.Popen[str]:
    """The script, with its run on the way."""
    script = started(slurm, **options)
    slurm.wait_for((slurm.home / "run-is-on").exists)
    return script


def ray_nodes(slurm: StandIns) -> Mapping[str, Mapping[str, Any]]:
    """How Ray was started, by node."""
    return {call["node"]: call for call in slurm.calls("ray")}


def test_the_head_is_on_the_first_node_and_workers_are_on_the_others(slurm: StandIns) -> None:
    script = running(slurm)
    slurm.wait_for(lambda: len(ray_nodes(slurm)) == 3)
    end_run(slurm, "0")
    code, errors = ended(script)

    assert code == 0, errors
    nodes = ray_nodes(slurm)
    address = f"10.0.0.7:{20000 + JOB % 10000}"
    assert "--head" in nodes["node1"]["arguments"] and "--node-ip-address=10.0.0.7" in nodes["node1"]["arguments"]
    assert f"--port={address.partition(':')[2]}" in nodes["node1"]["arguments"]
    assert "--dashboard-host=127.0.0.1" in nodes["node1"]["arguments"]
    for name in ("node2", "node3"):
        assert f"--address={address}" in nodes[name]["arguments"] and "--head" not in nodes[name]["arguments"]
    for node in nodes.values():
        assert {"start", "--block", "--num-cpus=88", f"--temp-dir={FOLDER}"} <= set(node["arguments"])
        assert node["limit"][0] == node["limit"][1]
    (run,) = slurm.calls("convmae")
    assert run["arguments"] == ["pretrain", *WORDS, "--supervised"]
    assert ClusterAddress.parse(run["address"]).text == address


def test_the_address_of_the_head_can_be_given(slurm: StandIns) -> None:
    script = running(slurm, HEAD_ADDRESS="192.168.4.1")
    end_run(slurm, "0")

    assert ended(script)[0] == 0
    assert slurm.calls("convmae")[0]["address"].startswith("192.168.4.1:")


def test_every_process_has_the_same_token_which_is_in_no_command_line(slurm: StandIns) -> None:
    script = running(slurm)
    slurm.wait_for(lambda: len(ray_nodes(slurm)) == 3)
    end_run(slurm, "0")
    ended(script)

    (token,) = {call["token"] for call in [*slurm.calls("ray"), *slurm.calls("convmae")]}
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert {call["mode"] for call in slurm.calls("ray")} == {"token"}
    assert not [call for call in slurm.calls() if token in " ".join(call["arguments"])]


def test_the_head_has_the_health_checks_of_the_other_clusters(slurm: StandIns) -> None:
    script = running(slurm)
    end_run(slurm, "0")
    ended(script)

    health = ray_nodes(slurm)["node1"]["health"]
    assert {name.removeprefix("RAY_"): int(value) for name, value in health.items()} == RAY_SETTINGS


def test_one_node_is_head_and_all(slurm: StandIns) -> None:
    script = running(slurm, nodes=1)
    end_run(slurm, "0")

    assert ended(script)[0] == 0
    assert set(ray_nodes(slurm)) == {"node1"}


def test_at_the_time_limit_the_run_saves_and_the_job_is_queued_again_when_all_is_gone(slurm: StandIns) -> None:
    script = running(slurm)
    slurm.wait_for(lambda: len(list(FOLDER.glob("*"))) == 3)
    script.send_signal(signal.SIGUSR1)
    code, errors = ended(script)

    assert code == 0, errors
    assert [call.get("saved") for call in slurm.calls("convmae")] == [None, True]
    assert slurm.calls()[-1]["arguments"] == ["requeue", str(JOB)]
    stopped = [call["nodes"] for call in slurm.calls("srun") if call.get("ended") == ["ray", "start"]]
    assert sorted(stopped) == [["node1"], ["node2", "node3"]]
    assert not FOLDER.exists()


def test_a_job_that_is_asked_to_end_saves_and_is_not_queued_again(slurm: StandIns) -> None:
    script = running(slurm)
    script.send_signal(signal.SIGTERM)
    code, errors = ended(script)

    assert code == 0, errors
    assert slurm.calls("convmae")[-1]["saved"]
    assert not [call for call in slurm.calls("scontrol") if call["arguments"][0] == "requeue"]
    assert not FOLDER.exists()


def test_a_run_that_fails_gives_its_code_and_is_not_queued_again(slurm: StandIns) -> None:
    script = running(slurm)
    end_run(slurm, "1")
    code, _ = ended(script)

    assert code == 1
    assert not [call for call in slurm.calls("scontrol") if call["arguments"][0] == "requeue"]
    assert not FOLDER.exists()


def test_a_time_limit_that_comes_before_the_run_starts_is_not_lost(slurm: StandIns) -> None:
    slurm.add("ray", RAY.replace('(home / "head-is-up").touch()', "pass"))
    script = started(slurm)
    slurm.wait_for(lambda: slurm.calls("ray"))
    script.send_signal(signal.SIGUSR1)
    code, errors = ended(script)

    assert code == 0, errors
    assert not slurm.calls("convmae")
    assert slurm.calls()[-1]["arguments"] == ["requeue", str(JOB)]


def test_a_head_that_ends_is_reported_at_once(slurm: StandIns) -> None:
    (slurm.home / "head-fails").touch()
    code, errors = ended(started(slurm))

    assert code == 1 and "Ray's head on node1 ended" in errors
    assert not slurm.calls("convmae")


def test_a_head_that_never_answers_is_reported(slurm: StandIns) -> None:
    slurm.add("ray", RAY.replace('(home / "head-is-up").touch()', "pass"))
    code, errors = ended(started(slurm))

    assert code == 1 and f"Ray's head on node1 does not answer at 10.0.0.7:{20000 + JOB % 10000}" in errors
    assert not FOLDER.exists()


@pytest.mark.parametrize(("words", "missing"), [([], "a recipe"), (WORDS, "ray is not in PATH")])
def test_what_is_missing_is_said_before_anything_starts(slurm: StandIns, words: list[str], missing: str) -> None:
    (slurm.folder / "ray").unlink()
    code, errors = ended(started(slurm, words=words))

    assert code == 2 and missing in errors
    assert not slurm.calls("srun")


def options() -> Mapping[str, str]:
    """What the script asks Slurm for."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    assert len(found) == SCRIPT.read_text().count("#SBATCH")
    return dict(found)


def test_slurm_warns_the_script_alone_in_time_to_save_and_queues_the_job_again() -> None:
    asked = options()

    assert asked["signal"] == "B:USR1@600"
    assert {"requeue", "no-kill", "exclusive"} <= set(asked)
    assert asked["ntasks-per-node"] == "1" and asked["open-mode"] == "append"


def test_the_command_of_the_first_lines_fits_the_allocation() -> None:
    (command,) = re.findall(r"^#   sbatch (.+)$", SCRIPT.read_text(), re.MULTILINE)
    _, script, recipe, *rest = command.split()

    assert script == "infra/slurm/convmae.sbatch" and rest[:2] == ["--run", "base-1"]
    amended = named_recipe(recipe).amended(parse_overrides(rest[2:]))
    assert amended.cpus_per_worker * int(options()["gpus-per-node"]) <= int(options()["cpus-per-task"])
