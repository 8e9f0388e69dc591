"""Hosts need root and namespaces: where there are none, the tests of this folder are skipped, with one reason."""

from __future__ import annotations

import pytest
from host_network import missing


@pytest.fixture(scope="session", autouse=True)
def namespaces() -> None:
    """Skip where no hosts can be made."""
    if why := missing():
        pytest.skip(why)
