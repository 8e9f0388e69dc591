"""A rank dies while the others are to save so that their group can grow."""

from __future__ import annotations

import queue
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from followed_runs import PATIENCE_SECONDS, events, trains, until
from hosted_runs import FIELDS
from patience import done
from ray_nodes import ray_cluster
from testbed import TILES, small_recipe

from pipeline.ingest.photographs import cut_tiles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NOTICED_SECONDS = 30
"""A pause would last for 120 s; without one the controller looks twice a second."""


def test_a_rank_that_dies_while_a_larger_group_waits_for_a_save_is_noticed_at_once(tmp_path: Path) -> None:
    cut_tiles(tmp_path / "photographs", TILES, seed=0)
    (tmp_path / "cluster").mkdir()
    with ray_cluster(tmp_path / "cluster") as cluster:
        node = cluster.add()
        url = f"{cluster.s3.url}/data"
        done(cluster.convmae("shard", str(tmp_path / "photographs"), url, "--samples-per-shard", "40"))
        fields = {**FIELDS, "standby": False, "run_root": f"{cluster.s3.url}/runs"}
        driver = cluster.convmae("--verbose", "pretrain", *small_recipe(url, **fields), "--run", "pausing")
        said: queue.Queue[str] = queue.Queue()
        for stream in (driver.stdout, driver.stderr):
            assert stream
            threading.Thread(target=lambda stream=stream: [said.put(line) for line in stream], daemon=True).start()
        run = cluster.run("pausing")
        until(run, "a checkpoint", trains(1, after=15))

        store = psutil.Process(cluster.s3.pid)
        store.suspend()  # no save comes to its end
        try:
            cluster.add()
            time.sleep(10)  # it is looked for every two seconds, and the group is to pause for it
            (rank,) = node.workers()
            rank.kill()
            deadline = time.monotonic() + NOTICED_SECONDS
            while "rank 0 failed" not in said.get(timeout=max(0.1, deadline - time.monotonic())):
                pass
        finally:
            store.resume()
        until(run, "both nodes", trains(2))
        restart = events(run, "restart")[-1]
        assert restart["reason"].startswith("rank 0: ActorDiedError")
        assert (restart["world_size_before"], restart["world_size"]) == (1, 2)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(PATIENCE_SECONDS) == 0
