"""A forwarding HTTP proxy on the loopback address that resolves names of its own and records its requests."""

from __future__ import annotations

import http.client
import select
import socket
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from loopback_server import LoopbackServer

# The host is the place's own: moto takes the first label of any other for a bucket.
_OF_THE_HOP = {"host", "connection", "proxy-connection", "proxy-authorization", "transfer-encoding", "content-length"}


@dataclass
class ForwardProxy(LoopbackServer):
    """Listens while the `with` block runs."""

    hosts: dict[str, str] = field(default_factory=dict)
    """HOST:PORT behind each name; other names do not resolve."""
    authorization: str = ""
    """Required with each request; empty if none is."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and URL of each request; CONNECT and HOST:PORT for a tunnel."""

    def __post_init__(self) -> None:
        super().__init__()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append((handler.command, handler.path))
        if self.authorization and handler.headers.get("Proxy-Authorization") != self.authorization:
            return _answer(handler, 407, b"")
        is_tunnel = handler.command == "CONNECT"
        host = handler.path.rpartition(":")[0] if is_tunnel else str(urlsplit(handler.path).hostname)
        if host not in self.hosts:
            return _answer(handler, 502, b"")
        return _tunnel(handler, self.hosts[host]) if is_tunnel else _pass_on(handler, self.hosts[host])


def _pass_on(handler: BaseHTTPRequestHandler, place: str) -> None:
    body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    parts = urlsplit(handler.path)
    kept = {name: value for name, value in handler.headers.items() if name.lower() not in _OF_THE_HOP}
    connection = http.client.HTTPConnection(place, timeout=30)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(
            handler.command, target, body=body or None, headers=kept | {"Content-Length": str(len(body))}
        )
        answer = connection.getresponse()
        _answer(handler, answer.status, answer.read(), dict(answer.getheaders()))
    finally:
        connection.close()


def _answer(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    given = {name.lower(): value for name, value in (headers or {}).items()}
    length = given.get("content-length", "0") if handler.command == "HEAD" else str(len(body))
    for name, value in given.items():
        if name not in _OF_THE_HOP | {"server", "date"}:
            handler.send_header(name, value)
    handler.send_header("Content-Length", length)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def _tunnel(handler: BaseHTTPRequestHandler, place: str) -> None:
    name, _, port = place.rpartition(":")
    with socket.create_connection((name, int(port)), timeout=30) as there:
        handler.send_response(200)
        handler.end_headers()
        here = handler.connection
        while ready := select.select([here, there], [], [], 30)[0]:
            for side, other in ((here, there), (there, here)):
                if side in ready:
                    if not (data := side.recv(65536)):
                        handler.close_connection = True
                        return
                    other.sendall(data)
