"""Hosts for tests, which need root and namespaces; else the tests of this folder are skipped, with one reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host_network import missing
from hosted_runs import Runs
from patience import done
from ray_hosts import RayHosts, ray_hosts
from testbed import TILES


@pytest.fixture(scope="session", autouse=True)
def namespaces() -> None:
    """Skip if no hosts can be made."""
    if why := missing():
        pytest.skip(why)


@pytest.fixture(scope="session")
def cluster(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """Store, head, laptop and two workers, which have names."""
    with ray_hosts(tmp_path_factory.mktemp("hosts"), workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def data(cluster: RayHosts) -> str:
    """URL of a data set that was made on the head."""
    url = f"{cluster.url}/data"
    done(cluster.convmae(cluster.head, "shard", cluster.photographs(TILES), url, "--samples-per-shard", "40"))
    return url


@pytest.fixture
def runs(cluster: RayHosts, data: str) -> Iterator[Runs]:
    """Runs on the cluster; those that a failed test leaves behind are ended."""
    runs = Runs(cluster, data)
    yield runs
    runs.end()
