"""Images that a web server does not serve are skipped, and an outage is not taken for that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from web_server import WebServer, serving

from pipeline.access.places import Given
from pipeline.errors import RefusedError, UnreachableError
from pipeline.ingest.source import Source
from pipeline.ingest.source_reader import SourceReader
from pipeline.store.storage import Storage

DEAD = Source(Given("http://127.0.0.1:1/x.jpg"), None, None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "there.jpg").write_bytes(b"image")
    with serving(tmp_path) as running:
        yield running


def test_a_dead_server_costs_its_own_images_and_is_waited_for_once(server: WebServer) -> None:
    reader = SourceReader(Storage(retry_seconds=60.0), "", hasty_seconds=0.5)
    assert reader.read(Source(Given(f"{server.address}/there.jpg"), None, None)) == b"image"

    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(RefusedError, match="its server cannot be reached"):
            reader.read(DEAD)

    assert time.monotonic() - began < 10
    reader.check()


def test_an_outage_is_when_nothing_can_be_read() -> None:
    reader = SourceReader(Storage(retry_seconds=0.5), "")
    with pytest.raises(RefusedError):
        reader.read(DEAD)

    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
        reader.check()


def test_a_server_that_goes_away_ends_the_task(tmp_path: Path) -> None:
    (tmp_path / "there.jpg").write_bytes(b"image")
    with serving(tmp_path) as server:
        source = Source(Given(f"{server.address}/there.jpg"), None, None)
        reader = SourceReader(Storage(retry_seconds=0.5), "")
        reader.read(source)

    with pytest.raises(UnreachableError):
        reader.read(source)


def test_an_address_that_always_fails_is_waited_for_briefly_the_second_time(server: WebServer) -> None:
    reader = SourceReader(Storage(retry_seconds=2.0), "", hasty_seconds=0.2)
    broken = Source(Given(f"{server.address}/broken.jpg"), None, None)
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(RefusedError):
            reader.read(broken)
        seconds.append(time.monotonic() - began)

    assert seconds[1] < seconds[0]
    assert reader.read(Source(Given(f"{server.address}/there.jpg"), None, None)) == b"image"


def test_a_local_file_that_cannot_be_read_is_no_fault_of_a_server(tmp_path: Path) -> None:
    reader = SourceReader(Storage(retry_seconds=0.5), str(tmp_path))

    with pytest.raises(FileNotFoundError):
        reader.read(Source(Given("gone.jpg"), None, None))
