"""Two drivers of a run, one of them cut off from the store for longer than its lease: only one continues."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from followed_runs import continues, events, until
from host import Host, inner
from hosted_runs import Runs, is_under_way, newest_claims
from patience import done
from ray_hosts import RayHosts

from pipeline.store.lease import DEAD_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture
def desk(cluster: RayHosts) -> Iterator[Host]:
    """A node for drivers in the foreground, without CPUs for ranks."""
    host = cluster.add_host("desk", "eth7")
    cluster.start_node(host, cpus=0)
    cluster.wait_for_nodes(host)
    yield host
    cluster.remove(host)


def test_of_a_driver_cut_off_for_longer_than_its_lease_and_another_only_one_continues(
    cluster: RayHosts, runs: Runs, desk: Host
) -> None:
    trace = f"{cluster.url}/traces/leased"
    recipe = runs.recipe(max_workers=2)
    first = cluster.convmae(desk, "pretrain", *recipe, "--run", "leased", "--trace", trace)
    run = cluster.run("leased")
    is_under_way(run, 2)
    process = inner(first).pid

    refusal = done(cluster.convmae(cluster.laptop, "submit", *recipe, "--run", "leased", "--trace", trace), code=2)[1]
    assert "must not be running already" in refusal and "@desk" in refusal

    cluster.network.separate(desk, cluster.store)
    time.sleep(DEAD_SECONDS + 5)
    done(cluster.convmae(cluster.laptop, "submit", *recipe, "--run", "leased", "--trace", trace))
    until(run, "the second driver", lambda now: now.get("attempt", 1) > 1)
    time.sleep(10)
    cluster.network.reunite(desk, cluster.store)

    _, err = done(first, code=2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "was taken over by" in line and "@head" in line, f"of process {process}: {err}"
    continues(run, 2, steps=40)
    takeovers = [event for event in events(run, "restart") if event["reason"] == "resumed by a new driver"]
    assert len(takeovers) == 1, run.read_events()
    claims = newest_claims(run)
    assert claims == sorted(claims) and claims[-1] == 2, "nothing of the first driver's is newer"
    runs.stop(run)
    runs.assert_undisturbed(run)
