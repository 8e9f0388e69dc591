"""The page of a real run in a browser, while one of its ranks is killed and its worker group grows."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psutil
import pytest
from browser import needs_browser, watched
from followed_runs import SPREAD, has_checkpoint, has_trained, made_dataset, trains, until
from patience import done, wait_until
from playwright.sync_api import Browser
from ray_nodes import Cluster, ray_cluster
from testbed import processes, small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), needs_browser]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and a node of one CPU."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add()
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a data set; then there are two nodes."""
    return made_dataset(cluster, tmp_path_factory.mktemp("photographs"), nodes=2)


def test_the_page_of_a_run_follows_a_kill_and_a_resize(cluster: Cluster, data: str, browser: Browser) -> None:
    fields = {**SPREAD, "run_root": f"{cluster.s3.url}/runs"}
    done(cluster.convmae("submit", *small_recipe(data, **fields), "--run", "watched-page"))
    run = cluster.run("watched-page")
    until(run, "two ranks", trains(2))
    until(run, "a checkpoint", has_checkpoint)
    out, _ = done(cluster.convmae("status", run.url, "--json"))
    address = str(json.loads(out)["page_url"])  # with the token, where the cluster is not on loopback

    with watched(browser, address) as seen:
        seen.waits_for(".state", "running")
        seen.waits_for_fact("Workers now", "2 of 3")
        seen.waits_for('[data-part="training"] svg.narrow', "loss")
        seen.page.evaluate("window.isTheSame = true")
        (drawer,) = (each for each in drawers() if "ray::" in " ".join(psutil.Process(each.ppid()).cmdline()))

        cluster.nodes[1].workers()[0].kill()
        has_trained(run, 2)
        seen.waits_for_fact("Restarts", "1")
        seen.waits_for('[data-part="attempts"] td', "restart")

        cluster.add()
        until(run, "three ranks", trains(3))
        seen.waits_for_fact("Workers now", "3 of 3")
        seen.waits_for('[data-part="attempts"] td', "resize")
        seen.is_in_order()
        assert seen.page.evaluate("window.isTheSame")
    done(cluster.convmae("stop", run.url))
    wait_until("the end of what draws", lambda: not is_alive(drawer), 120)


def drawers() -> list[psutil.Process]:
    """Those of other tests' monitors are not of a Ray worker."""
    return processes("jobs.report.live.drawing_process", psutil.process_iter())


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
