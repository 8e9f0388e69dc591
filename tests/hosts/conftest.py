"""Hosts need root and namespaces: where there are none, the tests of this folder are skipped, with one reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host_network import done, missing
from hosted_runs import Runs
from ray_hosts import RayHosts, ray_hosts
from testbed import TILES


@pytest.fixture(scope="session", autouse=True)
def namespaces() -> None:
    """Skip where no hosts can be made."""
    if why := missing():
        pytest.skip(why)


@pytest.fixture(scope="session")
def cluster(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """Store, head, laptop and two workers, which have names."""
    with ray_hosts(tmp_path_factory.mktemp("hosts"), workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def runs(cluster: RayHosts) -> Runs:
    """Runs on the cluster, on a data set that was made on its head."""
    data = f"{cluster.url}/data"
    done(cluster.convmae(cluster.head, "shard", cluster.photographs(TILES), data, "--samples-per-shard", "40"))
    return Runs(cluster, data)
