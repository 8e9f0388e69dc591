"""Two hosts as Debian's installer leaves them: each knows only its own name, as 127.0.1.1."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host import Names
from patience import done
from ray_hosts import RayHosts, ray_hosts
from testbed import TILES, losses, small_recipe

from pipeline.ingest.photographs import cut_tiles

STEPS = 6


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """The hosts' interfaces have different names."""
    with ray_hosts(tmp_path_factory.mktemp("hosts"), workers=2, names=Names.DEBIAN) as cluster:
        assert len({host.interface for host in cluster.network.hosts}) == 5
        yield cluster


@pytest.mark.timeout(1500)
@pytest.mark.slow
def test_ranks_on_debian_hosts_find_each_other(debian: RayHosts) -> None:
    out, _ = done(debian.convmae(debian.laptop, "doctor", "--store", f"{debian.url}/runs"), within_seconds=600)

    assert "all-reduce       gloo over 3 ranks" in out and "FAILED" not in out


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_over_debian_hosts_begins_on_a_laptop_with_photographs(debian: RayHosts) -> None:
    """In the README's words."""
    laptop, data, root = debian.laptop, f"{debian.url}/data", f"{debian.url}/runs"
    (photographs := laptop.home / "photographs").mkdir()
    cut_tiles(photographs, TILES, seed=0)

    shard = ("shard", "photographs", data, "--upload", f"{debian.url}/photographs", "--samples-per-shard", "40")
    out, _ = done(debian.convmae(laptop, *shard), within_seconds=600)
    assert f"{data}: {TILES} images in 3 shards (3 written, 0 kept), 0 sources skipped" in out
    placed = {"device": "cpu", "precision": "fp32", "min_workers": 2, "max_workers": 2, "cpus_per_worker": 1.0}
    recipe = small_recipe(data, run_root=root, epochs=100, max_steps=STEPS, loader_threads=1, **placed)
    out, err = done(debian.convmae(laptop, "submit", *recipe, "--run", "debian", "--follow"), within_seconds=600)

    assert f"debian: finished at step {STEPS} of {STEPS}" in out + err
    run = debian.run("debian")
    assert len(losses(run)) == STEPS
    assert {row["world_size"] for row in run.read_history()} == {2}
    assert run.read_heartbeat()["attempt"] == 1
    debian.wait_for_nothing_left()
