"""Pages of several runs over HTTP: the list, and a page of each as its run directory has it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING

from jobs.report.live.live_page import RUN_PARTS
from jobs.report.live.live_parts import LiveParts
from jobs.report.live.page_app import PATHS, PageApp
from jobs.report.live.page_token import refused
from jobs.report.live.run_drawing import RunDrawing
from jobs.report.live.run_list import LIST_PARTS, RunList
from jobs.run.directory import RunDirectory

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

_PATH = re.compile(r"/runs/([^/]+)(/|/parts)")


class RunsApp:
    """All pages. Concurrency: any number of threads. Blocking: never; parts are made elsewhere."""

    def __init__(self, runs: RunList) -> None:
        """Serve a list, and what it leads to."""
        self._runs = runs
        self._parts = LiveParts(lambda: runs, "runs")
        self._list = PageApp("ConvMAE runs", LIST_PARTS, self._parts)
        self._pages: dict[str, PageApp] = {}
        self._lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request (WSGI)."""
        path = environ.get("PATH_INFO", "")
        if path in PATHS:
            return self._list(environ, start_response)
        match = _PATH.fullmatch(path)
        run = self._runs.runs.get(match[1]) if match else None
        if match is None or run is None:
            self._parts.snapshot()  # it may be new: whoever asks again finds it
            return refused(start_response, HTTPStatus.NOT_FOUND, "No run of this name is listed.")
        return self._page(run)({**environ, "PATH_INFO": match[2]}, start_response)

    def _page(self, run: RunDirectory) -> PageApp:
        with self._lock:
            if run.url not in self._pages:
                parts = LiveParts(lambda: RunDrawing(run, lambda: None), f"page of {run.name}")
                self._pages[run.url] = PageApp(f"{run.name} · ConvMAE run", RUN_PARTS, parts, back="../../")
            return self._pages[run.url]
