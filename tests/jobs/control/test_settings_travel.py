"""Commands with settings of a shell in all its clothes, on a real cluster: everything lands in one store."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forward_proxy import ForwardProxy
from guarded_s3 import GuardedS3, Principal
from patience import wait_until
from testbed import TILES, Command, small_recipe

from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 240
JOBS = """
import os
from jobs.cluster.session import Session
from jobs.cluster.submission import job_client

session = Session.open(os.environ)
session.export()
for job in job_client(session).list_jobs():
    print(ascii(vars(job)))
"""


@dataclass
class Laboratory:
    """A store of the caller's own beside the local stack's, and a folder with their files of AWS."""

    guard: GuardedS3
    folder: Path
    server: Storage

    def profile(self, text: str) -> dict[str, str]:
        """Variables of a shell with one profile, which has the store's endpoint."""
        (self.folder / "config").write_text(f"[profile lab]\nendpoint_url = {self.guard.endpoint}\n{text}\n")
        files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
        return {**{name: str(self.folder / file) for name, file in files.items()}, "AWS_PROFILE": "lab"}

    def static(self) -> dict[str, str]:
        """A shell whose profile has a key that does not expire."""
        return self.profile("aws_access_key_id = LABKEY\naws_secret_access_key = laboratory-secret")

    def made(self, number: int) -> dict[str, str]:
        """A shell whose profile has keys made by a program; until the next call those of this number."""
        keys = {"AccessKeyId": f"ASIA{number}", "SecretAccessKey": "made", "SessionToken": f"token-{number}"}
        part = self.folder / "keys.part"
        part.write_text(json.dumps({"Version": 1, **keys}))
        part.replace(self.folder / "keys.json")
        for principal in self.guard.principals.values():
            principal.refusal = principal.refusal or "ExpiredToken"
        self.guard.principals[f"ASIA{number}"] = Principal(f"token-{number}")
        program = f"{sys.executable} -c \"print(open('{self.folder / 'keys.json'}').read())\""
        return self.profile(f"credential_process = {program}")


@pytest.fixture
def laboratory(open_s3: Storage, tmp_path: Path) -> Iterator[Laboratory]:
    with GuardedS3(open_s3, {"LABKEY": Principal()}).running() as guard:
        yield Laboratory(guard, tmp_path, open_s3)


def stacks_own(convmae: Command) -> Storage:
    return Storage.from_environment(convmae.stack.environment())


def test_tars_and_manifest_lie_in_the_callers_store_and_a_submitted_run_too(
    convmae: Command, laboratory: Laboratory, photographs: Path
) -> None:
    shell, data = laboratory.static(), "s3://bucket/lab/data"
    convmae("shard", str(photographs), data, "--samples-per-shard", "40", **shell)
    assert {"manifest.json", "shard-000000.tar", "shard-000002.index"} <= {*laboratory.server.list_names(data)}
    convmae("verify", data, "--deep", **shell)

    recipe = small_recipe(data, run_root="s3://bucket/lab/runs", max_steps=3)
    out, _ = convmae("submit", *recipe, "--run", "mine", "--follow", **shell)

    assert "mine: finished at step 3" in out
    run = RunDirectory(laboratory.server, "s3://bucket/lab/runs/mine")
    assert run.read_heartbeat()["state"] == "finished" and laboratory.server.exists(run.path("report.html"))
    assert {seen.key_id for seen in laboratory.guard.seen} == {"LABKEY"}
    assert not [seen for seen in laboratory.guard.seen if seen.refused]
    assert stacks_own(convmae).list_files(f"s3://{convmae.stack.bucket}/lab") == {}
    _nothing_tells("laboratory-secret", convmae)


def _nothing_tells(secret: str, convmae: Command) -> None:
    """Neither what Ray's dashboard shows of jobs, nor a log."""
    # In a process of its own: Ray keeps the token that it was first shown for as long as a process lives.
    told = subprocess.run(
        [sys.executable, "-c", JOBS], env=convmae.environment(), capture_output=True, text=True, check=True
    )
    shown = told.stdout.splitlines()
    assert any("CONVMAE_STORE_PARCEL" in job for job in shown) and not any(secret in job for job in shown)
    home = convmae.stack.settings.home
    logs = [path for path in (home / "ray").resolve().rglob("*") if path.is_file() and "/logs/" in str(path)]
    assert logs and not [path for path in [*logs, *home.glob("logs/*")] if secret.encode() in path.read_bytes()]


def test_a_command_from_elsewhere_brings_its_store_along(
    convmae: Command, laboratory: Laboratory, photographs: Path, tmp_path: Path
) -> None:
    stack = convmae.stack.environment()
    away = {
        "CONVMAE_HOME": str(tmp_path / "elsewhere"),
        "RAY_ADDRESS": convmae.stack.dashboard_url,
        "RAY_AUTH_MODE": stack["RAY_AUTH_MODE"],
        "RAY_AUTH_TOKEN_PATH": stack["RAY_AUTH_TOKEN_PATH"],
        **laboratory.static(),
    }
    data = "s3://bucket/elsewhere/data"
    words = ("shard", str(photographs), data, "--samples-per-shard", "40", "--upload", "s3://bucket/elsewhere/photos")

    out, _ = convmae(*words, **away)

    assert f"{TILES} images in 3 shards" in out
    assert "manifest.json" in laboratory.server.list_names(data)
    found = json.loads(convmae("doctor", "--store", "s3://bucket/elsewhere/runs", "--json", code=0, **away)[0])
    (settings,) = [finding for finding in found if finding["check"] == "settings"]
    assert "endpoint_url of profile lab of" in settings["detail"] and laboratory.guard.endpoint in settings["detail"]
    assert stacks_own(convmae).list_files(f"s3://{convmae.stack.bucket}/elsewhere") == {}


def test_keys_that_only_the_caller_can_make_are_renewed_in_every_rank(
    convmae: Command, laboratory: Laboratory, photographs: Path
) -> None:
    shell, data = laboratory.made(1), "s3://bucket/made/data"
    convmae("shard", str(photographs), data, "--samples-per-shard", "40", **shell)
    recipe = small_recipe(data, run_root="s3://bucket/made/runs", epochs=400, checkpoint_every_steps=10)
    process = convmae.start("pretrain", *recipe, "--run", "made", **shell)
    run = RunDirectory(laboratory.server, "s3://bucket/made/runs/made")
    steps = 0
    try:
        for number in (2, 3):
            wait_until("steps", lambda before=steps: run.read_heartbeat().get("step", 0) > before + 5, PATIENCE_SECONDS)
            laboratory.made(number)
            steps = run.read_heartbeat()["step"]
        wait_until("steps", lambda: run.read_heartbeat().get("step", 0) > steps + 30, PATIENCE_SECONDS)
        assert {row["attempt"] for row in run.read_history()} == {1}, "the group was never restarted"
        process.terminate()
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    assert {seen.key_id for seen in laboratory.guard.seen} == {"ASIA1", "ASIA2", "ASIA3"}


CLOTHES: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({}, 0, "0 runs|runs under"),
    "an empty endpoint": ({"AWS_ENDPOINT_URL": "", "AWS_ENDPOINT_URL_S3": ""}, 0, "runs under"),
    "a token of nobody": ({"AWS_SESSION_TOKEN": "t"}, 0, "runs under"),
    "a secret of nobody": ({"AWS_SECRET_ACCESS_KEY": "t"}, 0, "runs under"),
    "a region": ({"AWS_REGION": "eu-west-1"}, 0, "runs under"),
    "a profile that is not there": ({"AWS_PROFILE": "gone"}, 2, "error: AWS_PROFILE: must name a profile"),
    "keys": ({"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "x"}, 2, "error: run_root: .*AWS_ACCESS_KEY_ID names"),
    "half a key": ({"AWS_ACCESS_KEY_ID": "A"}, 2, "error: AWS_SECRET_ACCESS_KEY: must come with AWS_ACCESS_KEY_ID"),
    "a retry mode": ({"AWS_RETRY_MODE": "foo"}, 2, "error: AWS_RETRY_MODE: must be a retry mode"),
    "no address": ({"AWS_ENDPOINT_URL": "x"}, 2, "error: AWS_ENDPOINT_URL: must be an S3 endpoint"),
    "a damaged file": ({"AWS_CONFIG_FILE": "[default\n"}, 2, "error: AWS_CONFIG_FILE: must be a file that botocore"),
    "an accelerated bucket": (
        {"AWS_CONFIG_FILE": "[default]\ns3 =\n  use_accelerate_endpoint = true\n"},
        *(2, "error: s3.use_accelerate_endpoint of profile default of .*: must be off"),
    ),
    "a proxy that nobody serves": ({"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "localhost"}, 0, "runs under"),
    "proxies in lower case": ({"http_proxy": "http://127.0.0.1:9", "all_proxy": "socks5://x.test"}, 0, "runs under"),
}


@pytest.mark.parametrize("clothes", CLOTHES)
def test_a_list_in_many_clothes_ends_well_or_in_one_line(clothes: str, convmae: Command, tmp_path: Path) -> None:
    import re

    variables, code, says = CLOTHES[clothes]
    if content := variables.get("AWS_CONFIG_FILE"):
        (tmp_path / "config").write_text(content)
        variables = {**variables, "AWS_CONFIG_FILE": str(tmp_path / "config")}

    out, err = convmae("list", code=code, **variables)

    assert re.search(says, err if code else out)
    assert len(err.splitlines()) == (1 if code else 0)


def test_a_cluster_is_reached_through_a_proxy_by_a_name_that_it_alone_knows(
    convmae: Command, data: str, tmp_path: Path
) -> None:
    stack = convmae.stack.environment()
    place = convmae.stack.dashboard_url.removeprefix("http://")
    with ForwardProxy(hosts={"cluster.test": place}).running() as proxy:
        away = {
            "CONVMAE_HOME": str(tmp_path / "elsewhere"),
            "RAY_ADDRESS": "http://cluster.test:8265",
            "RAY_AUTH_MODE": stack["RAY_AUTH_MODE"],
            "RAY_AUTH_TOKEN_PATH": stack["RAY_AUTH_TOKEN_PATH"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "HOME": str(tmp_path),
            "http_proxy": proxy.endpoint,
        }
        out, err = convmae("verify", data, "--json", **away)

        assert json.loads(out)["samples"] == TILES
        assert err.splitlines()[-1].startswith("shards 3/3 "), "its progress came too"
        assert {url.split("/")[2] for _, url in proxy.asked} == {"cluster.test:8265"}
        _, refused = convmae("verify", data, code=2, **{**away, "http_proxy": "socks5://127.0.0.1:1"})
        assert refused.startswith("error: HTTP_PROXY: must be the address of an HTTP proxy")


def test_a_run_on_the_stack_does_not_notice_a_proxy(convmae: Command, data: str) -> None:
    shell = {"HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_PROXY": "x.test"}

    out, _ = convmae("submit", *small_recipe(data, max_steps=2), "--run", "behind-a-proxy", "--follow", **shell)

    assert "behind-a-proxy: finished at step 2" in out
