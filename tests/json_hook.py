"""A webhook that takes everything."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback_server import LoopbackServer


class JsonHook(LoopbackServer):
    """Keeps the JSON objects that it is sent, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[dict[str, Any]] = []

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.taken.append(json.loads(handler.rfile.read(int(handler.headers["Content-Length"]))))
        handler.send_response(200)
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"ok")
