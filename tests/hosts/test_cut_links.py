"""Links between hosts are cut silently and come back: the run continues on the same trajectory."""

from __future__ import annotations

import time
from typing import Any

import pytest
from followed_runs import continues, events, trains, until
from hosted_runs import Runs, is_under_way, newest_claims
from ray_hosts import RayHosts

from jobs.run.directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def assert_no_step_lost(run: RunDirectory, runs: Runs) -> None:
    """Check that ranks continue in their first attempt, under the first driver, to the end of an undisturbed run."""
    now = continues(run, 2, steps=60)
    assert now["attempt"] == 1, run.read_events()
    runs.stop(run)
    assert set(newest_claims(run)) == {1}
    runs.assert_undisturbed(run)


def test_a_store_that_falls_silent_for_one_host_or_all_costs_no_step(cluster: RayHosts, runs: Runs) -> None:
    run = runs.begin("storeless", max_workers=2)
    is_under_way(run, 2)

    cluster.network.separate(cluster.workers[1], cluster.store)
    time.sleep(20)
    cluster.network.reunite(cluster.workers[1], cluster.store)
    continues(run, 2)
    with cluster.network.without(cluster.store, seconds=30):
        pass
    assert_no_step_lost(run, runs)


def test_a_worker_gone_for_three_seconds_and_the_head_for_fifteen_cost_no_step(cluster: RayHosts, runs: Runs) -> None:
    run = runs.begin("blinks", max_workers=2)
    is_under_way(run, 2)

    with cluster.network.without(cluster.workers[1], seconds=3):
        pass
    continues(run, 2)
    with cluster.network.without(cluster.head, seconds=15):  # and with it driver, monitor and Ray's GCS
        pass
    assert_no_step_lost(run, runs)


def test_a_run_continues_without_a_worker_then_takes_it_back_and_another_one(cluster: RayHosts, runs: Runs) -> None:
    run = runs.begin("elastic", max_workers=3)
    begun = is_under_way(run, 2)
    silent = cluster.workers[1]

    with cluster.network.without(silent, seconds=30):
        pass

    def is_taken_back(now: dict[str, Any]) -> bool:
        cluster.keep_up()  # Ray ends a node that it took for dead; it has to be started again
        return trains(2)(now) and now["attempt"] >= 3

    until(run, "two ranks", is_taken_back)
    alone, together = events(run, "restart")[0], events(run, "resize")[0]
    assert (alone["world_size_before"], alone["world_size"]) == (2, 1)
    assert silent.name in alone["reason"] and "unreachable" in alone["reason"]
    assert alone["step"] >= begun["checkpoint_step"] and alone["steps_redone"] <= 2 * 20
    assert (together["world_size"], together["steps_redone"]) == (2, 0)

    cluster.add_worker()
    now = until(run, "three ranks", trains(3, after=together["step"]))
    assert events(run, "resize")[-1]["steps_redone"] == 0
    cluster.remove(cluster.workers[-1])
    until(run, "two ranks again", lambda seen: trains(2)(seen) and seen["attempt"] > now["attempt"])
    assert "unreachable" in events(run, "restart")[-1]["reason"]
    runs.stop(run)
    assert set(newest_claims(run)) == {1}
    runs.assert_undisturbed(run)
