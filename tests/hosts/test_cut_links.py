"""Links between hosts are cut, nobody is told, and some come back: the run goes on, on the same trajectory."""

from __future__ import annotations

import logging
import time

import pytest
from hosted_runs import Runs, events, goes_on, newest_claims, trains, until
from ray_hosts import RayHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

logger = logging.getLogger(__name__)

SILENT_SECONDS = 90
"""Without a step after a host fell silent, at most, however busy this machine is; `make bench-hosts` measures it."""


def test_short_silences_cost_no_step(cluster: RayHosts, runs: Runs) -> None:
    run = runs.begin("short", max_workers=2)
    until(run, "two ranks and a checkpoint", lambda now: trains(2, after=25)(now) and now.get("checkpoint_step", 0) > 0)
    network, (first, second) = cluster.network, cluster.workers[:2]

    with network.without(first, seconds=3):
        pass
    goes_on(run, 2)
    with network.without(cluster.head, seconds=15):
        pass
    goes_on(run, 2)
    network.separate(second, cluster.store)
    time.sleep(20)
    network.reunite(second, cluster.store)
    goes_on(run, 2)
    with network.without(cluster.store, seconds=30):
        pass
    now = goes_on(run, 2, steps=60)

    assert now["attempt"] == 1, run.read_events()
    runs.stop(run)
    assert [event["kind"] for event in run.read_events() if "restart" in event["kind"]] == []
    assert set(newest_claims(run)) == {1}
    runs.assert_undisturbed(run)


def test_a_silent_worker_is_gone_on_without_and_taken_back(cluster: RayHosts, runs: Runs) -> None:
    run = runs.begin("silent", max_workers=2)
    until(run, "two ranks and a checkpoint", lambda now: trains(2, after=25)(now) and now.get("checkpoint_step", 0) > 0)
    network, second = cluster.network, cluster.workers[1]

    with network.without(second, seconds=30):
        pass
    now = goes_on(run, 2, steps=40)
    assert now["attempt"] <= 3, "once without it, and once with it again, at most"

    network.cut(second)
    until(run, "one rank", lambda seen: trains(1)(seen) and seen["attempt"] > now["attempt"])
    restart = events(run, "restart")[-1]
    assert (restart["world_size_before"], restart["world_size"]) == (2, 1)
    assert second.name in restart["reason"] or second.address in restart["reason"], restart
    down = events(run, "recovered")[-1]
    logger.warning("%s fell silent: no step for %.1f s", second.name, down["down_seconds"])
    assert down["down_seconds"] < SILENT_SECONDS, down
    assert restart["steps_redone"] <= 2 * 20

    cluster.add_worker()
    until(run, "two ranks", trains(2, after=restart["step"]))
    assert events(run, "resize")[-1]["steps_redone"] == 0
    cluster.remove_worker(second)
    runs.stop(run)
    assert set(newest_claims(run)) == {1}
    runs.assert_undisturbed(run)
