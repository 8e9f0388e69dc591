"""A laptop that is not a node of the cluster and knows only its HTTP address; the cluster and its store are real."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import wait_until
from testbed import TILES, Command, processes, small_recipe
from testbed import family as family_of

from jobs.checkpoint.checkpoint import committed_steps

PATIENCE_SECONDS = 240
STORE = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


class Laptop(Command):
    """Runs commands as on another machine: without a local stack, with the dashboard's address and the token."""

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a shell on it, without credentials for the store."""
        stack = self.stack.environment()
        return super().environment(
            CONVMAE_HOME=str(self.home / "elsewhere"),
            RAY_ADDRESS=self.stack.dashboard_url,
            RAY_AUTH_MODE=stack["RAY_AUTH_MODE"],
            RAY_AUTH_TOKEN_PATH=stack["RAY_AUTH_TOKEN_PATH"],
            AWS_EC2_METADATA_DISABLED="true",
            **changes,
        )

    def credentials(self) -> dict[str, str]:
        """Variables with which it reaches the store by itself."""
        return {name: self.stack.environment()[name] for name in STORE}


@pytest.fixture(scope="module")
def laptop(convmae: Command, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(convmae.stack, tmp_path_factory.mktemp("laptop"))


@pytest.mark.slow
def test_a_folder_of_the_laptop_is_refused_unless_it_is_to_be_uploaded(laptop: Laptop, photographs: Path) -> None:
    destination = "s3://convmae/datasets/from-a-laptop"
    _, refused = laptop("shard", str(photographs), destination, code=2)
    assert "error: source: must be a place that the cluster's nodes reach" in refused
    assert "--upload" in refused

    upload = ("--upload", "s3://convmae/sources/from-a-laptop", "--samples-per-shard", "40")
    out, err = laptop("shard", str(photographs), destination, *upload, **laptop.credentials())
    assert f"{TILES + 1} files" in out
    assert "\nshards 3/3 " in out
    assert f"{TILES} images in 3 shards (3 written, 0 kept), 1 sources skipped" in out
    assert err == ""
    again, _ = laptop("shard", str(photographs), destination, *upload, **laptop.credentials())
    assert f"(0 B sent, {TILES + 1} were already there)" in again
    assert "(0 written, 3 kept)" in again


def test_output_errors_and_exit_codes_are_those_of_the_command(laptop: Laptop, data: str) -> None:
    out, _ = laptop("verify", data, "--json")
    assert json.loads(out)["samples"] == TILES

    out, err = laptop("verify", "s3://convmae/datasets/none-such", code=2)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: dataset: must hold a manifest.json")


@pytest.mark.slow
def test_the_doctor_examines_the_cluster_and_compares_the_laptop(laptop: Laptop) -> None:
    out, _ = laptop("doctor", "--store", "s3://convmae/runs", "--json")

    findings = json.loads(out)
    checks = [finding["check"] for finding in findings]
    assert findings[0]["detail"] == "no credentials here"
    assert {"cluster", "clock", "all-reduce", "versions"} <= set(checks)
    assert checks.count("store") == 5, "four from the cluster, one from the laptop"


@pytest.mark.slow
def test_ctrl_c_stops_a_run_in_the_foreground_and_other_commands_need_no_credentials(laptop: Laptop, data: str) -> None:
    fields = {"run_root": "s3://convmae/laptop-runs", "epochs": 1000, "checkpoint_every_steps": 10}
    process = laptop.start("pretrain", *small_recipe(data, **fields), "--run", "away")
    run = type(laptop.run("away"))(laptop.run("away").storage, "s3://convmae/laptop-runs/away")
    wait_until("a checkpoint", lambda: run.exists() and bool(committed_steps(run)), PATIENCE_SECONDS)

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)

    assert process.returncode == 0, err
    assert "away: stopped; the same command resumes it from its checkpoint" in out
    assert "begins: s3://convmae/laptop-runs/away" in out
    assert "Traceback" not in out + err
    assert "pid=" not in out + err, "lines of Ray and of workers"
    assert committed_steps(run)[-1] == run.read_heartbeat()["step"]
    assert not processes("jobs.cli.command_job", family_of(laptop.stack))

    out, _ = laptop("status", "away", "--json")  # the run root is the one last used
    assert json.loads(out)["state"] == "stopped"


@pytest.mark.slow
def test_a_large_consolidation_runs_on_the_cluster(laptop: Laptop, data: str) -> None:
    fields = {"run_root": "s3://convmae/laptop-runs", "max_steps": 4}
    own = laptop.credentials()
    laptop("submit", *small_recipe(data, **fields), "--run", "consolidated", "--follow", **own)
    # In a process of its own: Ray keeps the token that it was first shown for as long as a process lives.
    any_is_large = (
        "from jobs.cli import main; from jobs.consolidation import consolidate_command;"
        " consolidate_command.CLUSTER_BYTES = 1; main.main()"
    )
    command = [sys.executable, "-c", any_is_large, "consolidate", "consolidated", "--dtype", "bf16"]

    done = subprocess.run(
        command, env=laptop.environment(**own), capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "step 4: s3://convmae/laptop-runs/consolidated/consolidated/" in done.stdout


def test_a_job_that_is_killed_is_reported_and_nothing_hangs(laptop: Laptop, data: str) -> None:
    fields = {"run_root": "s3://convmae/laptop-runs", "epochs": 1000}
    process = laptop.start("pretrain", *small_recipe(data, **fields), "--run", "killed")
    wait_until(
        "the job", lambda: bool(processes("jobs.cli.command_job pretrain", family_of(laptop.stack))), PATIENCE_SECONDS
    )

    for victim in processes("jobs.cli.command_job pretrain", family_of(laptop.stack)):
        victim.kill()

    out, err = ended(process)
    assert process.returncode == 1, out
    assert "ended without an exit code (failed); the same command resumes it" in err


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for a command."""
    return process.communicate(timeout=PATIENCE_SECONDS)
