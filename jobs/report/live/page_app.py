"""A live page over HTTP: its frame, and its parts as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from jobs.report.live.live_page import POLICY, frame
from jobs.report.live.live_parts import LiveParts
from jobs.report.live.page_token import refused

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

FRAME_PATH, PARTS_PATH = "/", "/parts"
PATHS = frozenset({FRAME_PATH, PARTS_PATH})
MOST_DIGESTS = 100
_HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
]


class PageApp:
    """One page. Concurrency: any number of threads. Blocking: never; parts are made elsewhere."""

    def __init__(
        self,
        title: str,
        names: Sequence[str],
        parts: LiveParts,
        *,
        back: str = "",
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Serve a page.

        Args:
            title: Of the window.
            names: Its parts, in their order.
            parts: Makes them.
            back: Relative URL of the page above.
            wall: Unix seconds.
        """
        self._frame, self._parts, self._wall = frame(title, names, back=back).encode(), parts, wall

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request (WSGI)."""
        if environ["REQUEST_METHOD"] != "GET":
            return refused(start_response, HTTPStatus.METHOD_NOT_ALLOWED, "Use GET.", [("Allow", "GET")])
        path = environ.get("PATH_INFO", "")
        if path not in PATHS:
            return refused(start_response, HTTPStatus.NOT_FOUND, "There is no such page.")
        if path == FRAME_PATH:
            kind, body = "text/html; charset=utf-8", self._frame
        else:
            kind, body = "application/json", self._newer_parts(environ.get("QUERY_STRING", ""))
        start_response("200 OK", [("Content-Type", kind), *_HEADERS])
        return [body]

    def _newer_parts(self, query: str) -> bytes:
        snapshot = self._parts.snapshot()
        known = set(parse_qs(query).get("have", [""])[0].split(",")[:MOST_DIGESTS])
        newer = {name: part for name, part in snapshot.parts.items() if part[0] not in known}
        return json.dumps({"notice": snapshot.age_text(self._wall()), "parts": newer}).encode()
