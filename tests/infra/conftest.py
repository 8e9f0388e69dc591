"""The image, built once for all tests that inspect or run it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from container_engine import Engine, container_engine, why_none
from image_build import IMAGE, build, copy_tree, make_bases


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """Podman, with the base images of the image."""
    if reason := why_none():
        pytest.skip(reason)
    with container_engine() as engine:
        make_bases(engine)
        yield engine


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's tree, with secrets lying around in it."""
    folder = tmp_path_factory.mktemp("source") / "tree"
    copy_tree(folder)
    return folder


@pytest.fixture(scope="session")
def image(engine: Engine, tree: Path) -> str:
    """Name of the image that the project's own Dockerfile builds."""
    built = build(engine, tree, IMAGE)
    assert built.returncode == 0, built.stdout[-6000:] + built.stderr[-6000:]
    return IMAGE
