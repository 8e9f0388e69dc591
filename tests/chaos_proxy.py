"""An HTTP proxy in front of a real S3 server that disturbs answers as networks and busy stores do."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from loopback_server import LoopbackServer

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message>'
    b"</Error>"
)
CHUNK_BYTES = 4096


@dataclass(frozen=True)
class Request:
    """A request that came through."""

    method: str
    path: str
    client_port: int
    """The client's, on this machine."""
    first: int
    """Of the byte range."""
    if_match: str | None
    agent: str
    """Who sent it: User-Agent."""
    number: int
    """Of this proxy's GETs of tars, from 0; -1 for other objects."""
    sent: list[int] = field(default_factory=list, compare=False)
    """Bytes of body that were sent, in pieces."""


@dataclass
class Behaviour:
    """What happens to GETs of tars and to writes; may be changed while requests are in progress."""

    busy_until: float = 0.0
    """Every request gets 503 SlowDown until then, by time.monotonic()."""
    cuts: Callable[[Request], bool] = lambda request: False
    """Whether the connection breaks off in the middle of the body."""
    flips: Callable[[Request], bool] = lambda request: False
    """Whether a byte in the middle of the body arrives damaged."""
    hangs: Callable[[Request], bool] = lambda request: False
    """Whether no answer comes until the proxy is closed."""
    bytes_per_second: float = float("inf")
    before_write: Callable[[Request], bool] = lambda request: True
    """Called when a PUT or POST has arrived completely; whether to pass it on. If not, its connection breaks off."""


class ChaosProxy(LoopbackServer):
    """Listens on the loopback address while the `with` block runs."""

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.behaviour = Behaviour()
        self.requests: list[Request] = []
        self.refused = 0
        self._upstream = urlsplit(upstream)
        self._lock = threading.Lock()

    def tar_requests(self) -> list[Request]:
        """GETs of tars so far."""
        return [request for request in self.requests if request.number >= 0]

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = self._note(handler)
        behaviour = self.behaviour
        if time.monotonic() < behaviour.busy_until:
            self.refused += 1
            self._answer(handler, 503, {"Content-Type": "application/xml"}, SLOW_DOWN, request)
            return
        is_tar = request.number >= 0
        if is_tar and behaviour.hangs(request):
            self.closed.wait()
            return
        sent = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if request.method in ("PUT", "POST") and not behaviour.before_write(request):
            handler.close_connection = True
            return
        asked = {key: value for key, value in handler.headers.items() if key.lower() != "expect"}  # already answered
        connection = http.client.HTTPConnection(str(self._upstream.hostname), self._upstream.port, timeout=30)
        try:
            connection.request(handler.command, handler.path, body=sent or None, headers=asked)
            answer = connection.getresponse()
            body = bytearray(answer.read())
        except OSError:
            handler.close_connection = True
            return
        finally:
            connection.close()
        headers = {key: value for key, value in answer.getheaders() if key.lower() not in ("connection", "date")}
        if is_tar and body and answer.status == 206 and behaviour.flips(request):
            body[len(body) // 2] ^= 1
        cut = is_tar and answer.status == 206 and behaviour.cuts(request)
        self._answer(handler, answer.status, headers, bytes(body), request, cut=cut)

    def _note(self, handler: BaseHTTPRequestHandler) -> Request:
        wanted = handler.headers.get("Range", "bytes=0-")
        first = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
        path = urlsplit(handler.path).path
        with self._lock:
            is_tar = path.endswith(".tar") and handler.command == "GET"
            number = len(self.tar_requests()) if is_tar else -1
            if_match = handler.headers.get("If-Match")
            agent = handler.headers.get("User-Agent", "")
            request = Request(handler.command, path, handler.client_address[1], first, if_match, agent, number)
            self.requests.append(request)
        return request

    def _answer(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        body: bytes,
        request: Request,
        *,
        cut: bool = False,
    ) -> None:
        with contextlib.suppress(OSError):
            handler.send_response(status)
            for key, value in headers.items():
                if key.lower() not in ("content-length", "server"):
                    handler.send_header(key, value)
            length = headers.get("Content-Length", str(len(body))) if handler.command == "HEAD" else str(len(body))
            handler.send_header("Content-Length", length)
            handler.end_headers()
            if handler.command == "HEAD":
                return
            end = len(body) // 2 if cut else len(body)
            for start in range(0, end, CHUNK_BYTES):
                piece = body[start : min(start + CHUNK_BYTES, end)]
                handler.wfile.write(piece)
                request.sent.append(len(piece))
                time.sleep(len(piece) / self.behaviour.bytes_per_second)
            if cut:
                handler.wfile.flush()
                handler.close_connection = True
