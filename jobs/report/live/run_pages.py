"""The page of a live run, as its monitor serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.report.live.drawing_process import DrawingProcess
from jobs.report.live.live_figures import LiveFigures
from jobs.report.live.live_page import RUN_PARTS
from jobs.report.live.live_parts import LiveParts
from jobs.report.live.page_app import PATHS, PageApp
from jobs.report.live.page_token import Guard, run_token
from jobs.run.directory import RunDirectory

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication


def run_pages(run: RunDirectory, host: str, figures: Callable[[], LiveFigures]) -> dict[str, WSGIApplication]:
    """What is served by path.

    Args:
        run: The live run.
        host: Where its monitor listens; another one than loopback makes the page ask for the run's token.
        figures: Of this moment; called from other threads.
    """
    guard = Guard(run_token(run, host), f"`convmae status {run.name}` prints the address that has it.")
    parts = LiveParts(lambda: DrawingProcess(run, figures), "page")
    app = guard.protects(PageApp(f"{run.name} · ConvMAE run", RUN_PARTS, parts))
    return dict.fromkeys(PATHS, app)
