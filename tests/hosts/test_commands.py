"""All commands of the README, on the head and on a laptop that knows only the cluster's HTTP address."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from followed_runs import trains, until
from host import Host, inner
from hosted_runs import Runs
from patience import done
from ray_hosts import DASHBOARD_PORT, RayHosts
from testbed import TILES, losses, small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

README = (Path(__file__).parents[2] / "README.md").read_text()
OF_THE_LOCAL_STACK = {"up", "down"}
NO_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_ENDPOINT_URL": "", "AWS_REGION": ""}
STEPS = 16


class Shell:
    """A user's commands on one host; records which were typed."""

    def __init__(self, cluster: RayHosts, host: Host, **variables: str) -> None:
        self.cluster, self.host, self.variables = cluster, host, variables
        self.typed: set[str] = set()

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Standard output; standard error if the command fails."""
        self.typed.add(arguments[0])
        process = self.cluster.convmae(self.host, *arguments, **self.variables)
        out, err = done(process, code, within_seconds=600)
        assert "Traceback" not in out + err, out + err
        for foreign in ("[c10d]", "(raylet", "pid=", "Ignoring upload", "repeated 2x"):
            assert foreign not in out + err, f"not the command's own: {out}{err}"
        return err if code else out


def named_in_readme() -> set[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    return set(re.findall(r"(?:^\$ |&& )(?:\.venv/bin/)?convmae ([a-z]+)", "\n".join(blocks), flags=re.MULTILINE))


def work_through(convmae: Shell, root: str, place: str) -> dict[str, str]:
    """The README's commands in its order, on data and runs of one place; returns what both places must print alike.

    Long, because the README is one sequence of commands.
    """
    bucket = root.rpartition("/")[0]
    data, run = f"{bucket}/{place}", place
    alike = {}
    found = convmae("doctor")
    assert "all-reduce       gloo over 3 ranks" in found and "FAILED" not in found
    assert f"{TILES} images in 3 shards (3 written, 0 kept)" in convmae(
        "shard", f"{bucket}/photographs", data, "--samples-per-shard", "40"
    )
    assert "(0 written, 3 kept)" in convmae("shard", f"{bucket}/photographs", data, "--samples-per-shard", "40")
    assert f"{TILES}" in convmae("index", data, "--out", f"{data}-index")
    verified = json.loads(convmae("verify", data, "--deep", "--json"))
    alike["verify"] = str({name: value for name, value in verified.items() if name not in {"url", "seconds"}})
    alike["inspect"] = convmae("inspect", "convmae_base")
    simulated = ("--nodes", "16", "--mtbf-hours", "500", "--spot-mtbf-hours", "12")
    alike["simulate"] = convmae("simulate", "convmae_base", *simulated)
    ordered = ("--batch", "64", "--lanes", "8", "--world", "3", "--step", "1000")
    alike["order"] = convmae("order", data, *ordered).replace(data, "DATA")

    placed = {"device": "cpu", "precision": "fp32", "cpus_per_worker": 1.0, "loader_threads": 1, "max_workers": 2}
    recipe = small_recipe(data, epochs=1000, checkpoint_every_steps=8, **placed)
    told = convmae("submit", *recipe, f"max_steps={STEPS}", "--run", run, "--follow")
    assert f"{run}: finished at step {STEPS} of {STEPS}" in told
    assert "finished" in convmae("status", run)
    assert f"{run} " in convmae("list")
    assert convmae("logs", run)
    rows = [json.loads(line) for line in convmae("history", run, "--json").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert convmae("quarantine", run) == ""
    alike["losses"] = str([round(row["loss"], 5) for row in rows])

    convmae("submit", *recipe, "--run", f"{run}-stopped")
    until(convmae.cluster.run(f"{run}-stopped"), "steps", trains(2, after=2))
    assert "stopped at step" in convmae("stop", f"{run}-stopped")
    convmae("resume", f"{run}-stopped")
    until(convmae.cluster.run(f"{run}-stopped"), "steps", lambda now: trains(2)(now) and now["attempt"] == 2)
    convmae("stop", f"{run}-stopped")

    assert "2 checkpoints" in convmae("checkpoints", run, "--verify")
    assert "nothing" in convmae("prune", run)
    assert "step 8: " in convmae("consolidate", run, "--step", "8", "--dtype", "bf16")
    assert "official: " in convmae("export", run, "--format", "official", "--out", f"{bucket}/weights-{place}")
    assert "report.html" in convmae("report", run)
    assert f"{run} is finished" in convmae("pretrain", *recipe, f"max_steps={STEPS}", "--run", run)
    assert "error: " in convmae("pretrain", "tiny", "data=", "--run", "none", code=2)
    return alike


def test_every_command_of_the_readme_works_alike_on_the_head_and_from_a_laptop(cluster: RayHosts, runs: Runs) -> None:
    root = f"{cluster.url}/runs"
    with_keys = Shell(cluster, cluster.laptop, CONVMAE_RUN_ROOT=root)
    (cluster.laptop.home / "photographs").mkdir()
    for photograph in (cluster.head.home / "photographs").rglob("*.jpg"):
        copy = cluster.laptop.home / photograph.relative_to(cluster.head.home)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(photograph.read_bytes())
    upload = f"{cluster.url}/photographs"
    refusal = with_keys("shard", "photographs", f"{cluster.url}/uploaded", code=2)
    assert "--upload" in refusal, "a folder of the laptop is refused with the remedy"
    assert f"{TILES} images" in with_keys("shard", "photographs", f"{cluster.url}/uploaded", "--upload", upload)

    laptop = Shell(cluster, cluster.laptop, CONVMAE_RUN_ROOT=root, **NO_KEYS)
    head = Shell(cluster, cluster.head, CONVMAE_RUN_ROOT=root)
    assert work_through(laptop, root, "laptop") == work_through(head, root, "head")
    assert named_in_readme() - OF_THE_LOCAL_STACK <= laptop.typed & head.typed
    assert losses(cluster.run("laptop-stopped"))
    cluster.wait_for_nothing_left()


def test_ctrl_c_on_the_laptop_saves_and_stops_a_run_in_the_foreground(cluster: RayHosts, runs: Runs) -> None:
    pretrain = ("pretrain", *runs.recipe(max_workers=2), "--run", "interrupted")
    process = cluster.convmae(cluster.laptop, *pretrain, **NO_KEYS)
    run = cluster.run("interrupted")
    until(run, "steps", trains(2, after=5))

    inner(process).send_signal(signal.SIGINT)

    out, err = done(process)
    assert "interrupted: stopped; the same command resumes it from its checkpoint" in out + err
    assert run.read_heartbeat()["state"] == "stopped"
    cluster.wait_for_nothing_left()


def test_a_wrong_address_is_one_line_with_a_remedy(cluster: RayHosts) -> None:
    laptop = Shell(cluster, cluster.laptop, RAY_ADDRESS=f"http://{cluster.place(cluster.store)}:{DASHBOARD_PORT}")
    error = laptop("shard", f"{cluster.url}/photographs", f"{cluster.url}/nowhere", code=2)
    assert error.count("\n") == 1 and error.startswith("error: RAY_ADDRESS")
