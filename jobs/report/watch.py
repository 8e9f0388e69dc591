"""`convmae status --watch`: the status of a run, redrawn until it ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.report.status import event_line, run_status, status_lines
from jobs.run.directory import FINAL_STATES, RunDirectory
from jobs.terminal import DrawnElsewhere, ShowStatus, status_text, write_line
from pipeline.printable import printable

WATCH_SECONDS = 2.0
"""Between reads; the heartbeat is written about as often."""
EVENTS_SHOWN = 6
_STYLES = {"running": "green", "finished": "green", "failed": "bold red", "interrupted": "bold red"}


def watch_run(run: RunDirectory, show: ShowStatus, pause: Callable[[float], None] = time.sleep) -> None:
    """Show the run's status, with its newest events, until it is in a final state.

    Args:
        run: An existing run.
        show: Draws one status.
        pause: Waits some seconds.
    """
    while True:
        status = {**run_status(run), "events": run.read_newest_events(EVENTS_SHOWN)}
        show(status)
        if status["state"] in FINAL_STATES:
            return
        pause(WATCH_SECONDS)


@contextmanager
def status_display(*, as_json: bool, stream: TextIO | None = None) -> Iterator[ShowStatus]:
    """What `watch_run` draws with: JSON lines, a screen that is redrawn on a terminal, or lines in a log."""
    stream = stream or sys.stdout
    if as_json:
        yield lambda status: write_line(stream, json.dumps(status))
    elif stream.isatty() and isinstance(stream, DrawnElsewhere):
        with stream.live_status() as there:
            yield there
    elif stream.isatty():
        with Live(console=Console(file=stream), auto_refresh=False) as live:
            yield lambda status: live.update(_screen(status), refresh=True)
    else:
        yield lambda status: write_line(stream, _line(status))


def _line(status: Mapping[str, Any]) -> str:
    return f"{status['run']} {status['step']}/{status['total_steps']} {status_text(status)}"


def _screen(status: Mapping[str, Any]) -> Group:
    table = Table(box=None, show_header=False, pad_edge=False)
    for field, value in status_lines(status):
        style = _STYLES.get(value, "yellow") if field == "state" else ""
        table.add_row(Text(field, "dim"), Text(printable(value), style))
    bar = ProgressBar(total=status["total_steps"] or None, completed=status["step"], pulse=False)
    events = [
        Text(printable(event_line(event)), "dim", no_wrap=True, overflow="ellipsis") for event in status["events"]
    ]
    return Group(bar, table, *events)
