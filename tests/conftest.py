"""Fixtures that several parts share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.stack import Stack, down, up


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the local stack share one and take turns; with `--dist loadgroup` others run beside them."""
    for item in items:
        if "local_stack" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("stack"))


@pytest.fixture(scope="session")
def local_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The embedded stack, with real services, in a home of its own; one for the whole test session."""
    home = tmp_path_factory.mktemp("stack")
    yield up(home, num_cpus=4)
    down(home)
