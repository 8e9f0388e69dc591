"""Two hosts as Debian's installer leaves them: each knows only its own name, as 127.0.1.1."""

from __future__ import annotations

from pathlib import Path

import pytest
from host import Names
from patience import done
from ray_hosts import ray_hosts
from testbed import TILES, losses, small_recipe

from pipeline.ingest.photographs import cut_tiles

STEPS = 6


@pytest.mark.timeout(1500)
def test_ranks_on_debian_hosts_find_each_other(tmp_path: Path) -> None:
    """From a laptop with photographs, in the README's words; the hosts' interfaces have different names."""
    with ray_hosts(tmp_path, workers=2, names=Names.DEBIAN) as cluster:
        assert len({host.interface for host in cluster.network.hosts}) == 5
        laptop = cluster.laptop
        (photographs := laptop.home / "photographs").mkdir()
        cut_tiles(photographs, TILES, seed=0)
        data, root = f"{cluster.url}/data", f"{cluster.url}/runs"

        out, _ = done(cluster.convmae(laptop, "doctor", "--store", root), within_seconds=600)
        assert "all-reduce       gloo over 3 ranks" in out and "FAILED" not in out
        shard = ("shard", "photographs", data, "--upload", f"{cluster.url}/photographs", "--samples-per-shard", "40")
        out, _ = done(cluster.convmae(laptop, *shard), within_seconds=600)
        assert f"{data}: {TILES} images in 3 shards (3 written, 0 kept), 0 sources skipped" in out
        placed = {"device": "cpu", "precision": "fp32", "min_workers": 2, "max_workers": 2, "cpus_per_worker": 1.0}
        recipe = small_recipe(data, run_root=root, epochs=100, max_steps=STEPS, loader_threads=1, **placed)
        out, err = done(cluster.convmae(laptop, "submit", *recipe, "--run", "debian", "--follow"), within_seconds=600)

        assert f"debian: finished at step {STEPS} of {STEPS}" in out + err
        run = cluster.run("debian")
        assert len(losses(run)) == STEPS
        assert {row["world_size"] for row in run.read_history()} == {2}
        assert run.read_heartbeat()["attempt"] == 1
        cluster.wait_for_nothing_left()
