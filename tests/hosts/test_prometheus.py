"""Prometheus on one host scrapes a run's exporter on another, through a cut between them."""

from __future__ import annotations

import json
import time

import pytest
from followed_runs import continues, trains, until
from hosted_runs import Runs
from prometheus_server import PROMETHEUS, asked, wait_for_series
from ray_hosts import PROMETHEUS_PORT, RayHosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus (apt-get install prometheus)"),
]

METRICS_PORT = 9400
CUT_SECONDS = 10


def test_prometheus_of_another_host_follows_a_run_through_a_cut(cluster: RayHosts, runs: Runs) -> None:
    watcher = cluster.add_host("watcher", "enx0")
    target = f"{cluster.place(cluster.head)}:{METRICS_PORT}"
    scrape = {"job_name": "convmae", "static_configs": [{"targets": [target]}]}
    configuration = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [scrape]}
    (watcher.home / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML
    assert PROMETHEUS
    watcher.serve("prometheus", PROMETHEUS, "--config.file=prometheus.yml", f"--web.listen-address=:{PROMETHEUS_PORT}")
    run = runs.begin("scraped", max_workers=2, metrics_port=METRICS_PORT)
    until(run, "two ranks", trains(2, after=5))
    url = watcher.door(PROMETHEUS_PORT)
    wait_for_series(url, 'convmae_step{run="scraped"} > 5')

    with cluster.network.without(watcher, seconds=CUT_SECONDS):
        pass
    now = continues(run, 2)
    wait_for_series(url, f'convmae_step{{run="scraped"}} >= {now["step"]}')

    (world,) = asked(url, 'convmae_world_size_ranks{run="scraped"}')
    assert float(world["value"][1]) == 2
    assert asked(url, f'min_over_time(up{{instance="{target}"}}[2m]) == 0'), "the cut was seen"
    assert not asked(url, 'resets(convmae_images_total{run="scraped"}[5m]) > 0')
    runs.stop(run)
    time.sleep(5)
    assert asked(url, f'up{{instance="{target}"}} == 0'), "the exporter is gone with its run"
    cluster.remove(watcher)
