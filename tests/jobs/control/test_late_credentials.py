"""A run on nodes whose credentials come from a metadata service that is late, has none, and rotates them."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guarded_s3 import GuardedS3
from local_s3 import LocalS3
from metadata_server import MetadataServer
from patience import wait_until
from ray_nodes import Cluster, ray_cluster
from testbed import TILES, losses, small_recipe

from pipeline.ingest.photographs import cut_tiles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

EPOCHS = 60
LATE_SECONDS = 8.0
PATIENCE_SECONDS = 600


@pytest.fixture
def cloud() -> Iterator[MetadataServer]:
    with MetadataServer().running() as cloud:
        yield cloud


@pytest.fixture
def nodes(cloud: MetadataServer, tmp_path: Path) -> Iterator[tuple[Cluster, GuardedS3]]:
    """A cluster that was given no key, and the guard of its store."""
    guards: list[GuardedS3] = []
    with contextlib.ExitStack() as stack:

        def variables(s3: LocalS3) -> dict[str, str]:
            guards.append(stack.enter_context(GuardedS3(s3.storage).running()))
            none = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
            return {**cloud.environment(), **none, "AWS_ENDPOINT_URL": guards[0].endpoint}

        cluster = stack.enter_context(ray_cluster(tmp_path, variables))
        cluster.add(2)
        yield cluster, guards[0]


def started(cluster: Cluster, data: str) -> subprocess.Popen[str]:
    """The command that trains the run `late`."""
    recipe = small_recipe(
        data,
        run_root=f"{cluster.s3.url}/runs",
        epochs=EPOCHS,
        checkpoint_every_steps=20,
        device="cpu",
        precision="fp32",
        cpus_per_worker=1.0,
        loader_threads=1,
        min_workers=2,
        max_workers=2,
    )
    return cluster.convmae("pretrain", *recipe, "--run", "late")


def test_credentials_that_are_late_missing_and_rotated_cost_no_step(
    nodes: tuple[Cluster, GuardedS3], cloud: MetadataServer, tmp_path: Path
) -> None:
    cluster, guard = nodes
    cut_tiles(tmp_path / "photographs", TILES, seed=0)
    data = f"{cluster.s3.url}/datasets/late"
    cloud.rotate(guard)
    done = cluster.convmae("shard", str(tmp_path / "photographs"), data, "--samples-per-shard", "40")
    assert done.wait(PATIENCE_SECONDS) == 0, done.communicate()
    process = started(cluster, data)
    run = cluster.run("late")
    try:
        steps = 0
        for refusal in ("ExpiredToken", "InvalidAccessKeyId", "AccessDenied"):
            wait_until(
                "more steps", lambda before=steps: run.read_heartbeat().get("step", 0) > before, PATIENCE_SECONDS
            )
            cloud.now = None  # the service answers, and has nothing
            for principal in guard.principals.values():
                principal.refusal = refusal
            time.sleep(LATE_SECONDS)
            cloud.late_seconds = 2.0  # longer than botocore waits
            cloud.rotate(guard)
            time.sleep(2.0)
            cloud.late_seconds = 0.0
            steps = run.read_heartbeat().get("step", 0)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()

    assert process.returncode == 0, out + err
    assert len(losses(run)) == EPOCHS * TILES // 12
    assert {row["attempt"] for row in run.read_history()} == {1}, "the group was never restarted"
    assert [event["kind"] for event in run.read_events() if event["kind"] in ("restart", "checkpoint-failed")] == []
    refused = {seen.refused for seen in guard.seen} - {""}
    assert {"ExpiredToken", "InvalidAccessKeyId", "AccessDenied"} <= refused
    assert len({seen.key_id for seen in guard.seen}) == 4
