"""A run to which a node is added and from which one is taken, as Prometheus sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from followed_runs import SPREAD, made_dataset
from manifests import INFRA
from patience import done, wait_until
from prometheus_server import PROMETHEUS, asked, prometheus, wait_for_series
from ray_nodes import Cluster, ray_cluster
from testbed import small_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed"),
]

RUN = 'run="watched"'
STALE_SECONDS = 30
FIELDS = {**SPREAD, "max_workers": 2, "epochs": 2000}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A head and one node of one CPU."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    with ray_cluster(folder) as cluster:
        cluster.add()
        yield cluster


def test_world_size_follows_the_nodes_and_the_dead_leave_no_series(cluster: Cluster, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    data = made_dataset(cluster, photographs)
    fields = {**FIELDS, "run_root": f"{cluster.s3.url}/runs"}
    done(cluster.convmae("submit", *small_recipe(data, **fields), "--run", "watched"))
    run = cluster.run("watched")
    wait_until("its series", lambda: "metrics_url" in run.read_heartbeat(), 240)
    target = urlsplit(str(run.read_heartbeat()["metrics_url"])).netloc

    with prometheus(tmp_path, INFRA / "prometheus" / "convmae.rules.yml", target) as url:
        wait_for_series(url, f"convmae_world_size_ranks{{{RUN}}} == 1", 240)
        wait_for_series(url, f"convmae_images_total{{{RUN}}} > 0", 120)
        assert ranks(url) <= {"0"}

        added = cluster.add()
        wait_for_series(url, f"convmae_world_size_ranks{{{RUN}}} == 2", 240)
        wait_for_series(url, f'convmae_restarts_total{{{RUN}, reason="resize"}} == 1', 60)
        wait_until("series of both ranks", lambda: ranks(url) == {"0", "1"}, 60)

        added.kill()
        killed_at = time.monotonic()
        wait_until("no series of the rank that died", lambda: "1" not in ranks(url), STALE_SECONDS)
        while time.monotonic() < killed_at + STALE_SECONDS:  # and none comes back
            assert ranks(url) <= {"0"}
            time.sleep(1)
        wait_for_series(url, f"convmae_world_size_ranks{{{RUN}}} == 1", 240)
        wait_for_series(url, f'convmae_restarts_total{{{RUN}, reason="restart"}} == 1', 60)

        seen = f"[{int(time.monotonic() - killed_at) + 600}s]"
        named = asked(url, f'count by (__name__) ({{__name__=~"convmae_.+_total", {RUN}}})')
        counters = [row["metric"]["__name__"] for row in named]
        assert {"convmae_images_total", "convmae_worker_seconds_total", "convmae_restarts_total"} <= set(counters)
        assert not [name for name in counters if asked(url, f"resets({name}{{{RUN}}}{seen}) > 0")]
        (sizes,) = asked(url, f"max_over_time(convmae_world_size_ranks{{{RUN}}}{seen})")
        assert float(sizes["value"][1]) == 2
        done(cluster.convmae("stop", run.url))


def ranks(url: str) -> set[str]:
    """Of which a series is there now."""
    return {row["metric"]["rank"] for row in asked(url, f"convmae_rank_step_seconds{{{RUN}}}")}
