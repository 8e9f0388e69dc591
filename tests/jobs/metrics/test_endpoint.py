"""The server of a run's endpoint, whatever it serves."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterable
from typing import Any

import pytest

from jobs.metrics import endpoint
from jobs.metrics.endpoint import served, url_of


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode()]


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_an_address_of_either_family_is_served(host: str) -> None:
    try:
        server = served(app, host, 0)
    except OSError as error:
        if ":" not in host:
            raise
        pytest.skip(f"this machine has no IPv6: {error}")

    assert read(f"{url_of(host, server.server_port)}path") == b"/path"
    with pytest.raises(OSError, match="in use"):
        served(app, host, server.server_port)


def test_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread would wait for it for good."""
    monkeypatch.setattr(endpoint._Handler, "timeout", 0.5)

    def endless(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [bytes(100_000_000)]

    server = served(endless, "127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        deadline = time.monotonic() + 20
        while not server._open and time.monotonic() < deadline:
            time.sleep(0.01)
        while server._open and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server._open
