"""Fixtures that several parts share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.stack import Stack, down, up


@pytest.fixture(scope="session")
def local_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The embedded stack, with real services, in a home of its own; one for the whole test session."""
    home = tmp_path_factory.mktemp("stack")
    yield up(home, num_cpus=4)
    down(home)
