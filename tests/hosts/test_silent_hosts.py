"""A run notices that a host fell silent, long before Ray does."""

from __future__ import annotations

import time

import pytest
from followed_runs import PATIENCE_SECONDS, continues, events, trains, until
from hosted_runs import Runs
from patience import wait_until
from ray_hosts import RayHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

NOTICED_SECONDS = 20
"""Six on an idle machine; Ray itself takes 65."""
RANK = "ray::RayTrainWorker"


def test_a_host_that_falls_silent_is_noticed_in_seconds_and_taken_back(cluster: RayHosts, runs: Runs) -> None:
    run = runs.begin("noticed", max_workers=2)
    until(run, "two ranks and a checkpoint", lambda now: trains(2, after=25)(now) and now.get("checkpoint_step", 0) > 0)
    silent = cluster.workers[1]
    (rank,) = silent.matching(RANK)

    cut_at = time.time()
    cluster.network.cut(silent)
    wait_until("a word", lambda: bool(events(run, "unreachable")), PATIENCE_SECONDS)
    (told,) = events(run, "unreachable")
    cluster.network.join(silent)

    assert told["at_seconds"] - cut_at < NOTICED_SECONDS
    assert f"({silent.name}, {silent.address}) has been unreachable for" in told["reason"]
    assert told["reason"].startswith("the node of rank ")
    until(run, "the next attempt", lambda now: now["attempt"] > 1)
    assert events(run, "restart")[0]["reason"] == told["reason"]
    until(run, "both ranks", trains(2, after=told["step"]))
    assert not rank.is_running(), "what was left of the old group is gone"
    assert len(silent.matching(RANK)) == 1
    attempt = run.read_heartbeat()["attempt"]
    assert continues(run, 2)["attempt"] == attempt, "and all is well"
    runs.stop(run)
    runs.assert_undisturbed(run)


def test_a_host_that_falls_silent_while_its_rank_starts_delays_no_other(cluster: RayHosts, runs: Runs) -> None:
    run = runs.begin("starting", max_workers=2)
    silent = cluster.workers[1]
    wait_until("a rank's process", lambda: bool(silent.matching(RANK)), PATIENCE_SECONDS)

    cluster.network.cut(silent)
    try:
        wait_until("a word", lambda: bool(events(run, "unreachable")), PATIENCE_SECONDS)
    finally:
        cluster.network.join(silent)

    assert f"({silent.name}, {silent.address}) has been unreachable for" in events(run, "unreachable")[0]["reason"]
    until(run, "steps", lambda now: now["state"] == "running" and now["step"] > 5)
    runs.stop(run)
    runs.assert_undisturbed(run)
