"""Terminal output of commands: lines, tables, JSON, and progress (a bar on a terminal, lines in a log)."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO, runtime_checkable

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from pipeline.errors import UserError, clipped
from pipeline.printable import printable

LOG_INTERVAL_SECONDS = 10.0
MOST_BYTES = 2**60
"""Largest number of bytes in an option; no store has a larger object."""
ShowProgress = Callable[[int, int, str], None]
"""`show(done, total, text)`."""
ShowStatus = Callable[[Mapping[str, Any]], None]
_PLAIN = {"→": "->", "·": "-", "…": "...", "\N{EM DASH}": "-", "\N{BULLET}": "*"}
"""Plain replacements of the symbols in our own texts, for terminals that have only ASCII."""
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@runtime_checkable
class DrawnElsewhere(Protocol):
    """A stream whose reader draws live output: that of a command that runs as a job (jobs.remote.frames)."""

    def progress_bar(self, title: str) -> AbstractContextManager[ShowProgress]:
        """Show progress there."""

    def live_status(self) -> AbstractContextManager[ShowStatus]:
        """Draw a run's status there, over the last one."""


def open_streams() -> None:
    """Make the standard streams writable, whatever they are; call it before anything else.

    A closed stream is replaced by one that discards what is written; else the next file to be opened would get its
    number, and its output. Characters that a terminal's encoding lacks are replaced.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    nowhere = Path(os.devnull)
    sys.stdout = sys.stdout or nowhere.open("w", encoding="utf-8")
    sys.stderr = sys.stderr or nowhere.open("w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        fit_signs(stream)


def fit_signs(stream: TextIO) -> None:
    """Have a stream replace, as `shown` does, the characters that it cannot show, whatever writes to it."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_replacing())


def close_streams() -> bool:
    """Flush the standard streams; False if a reader is gone or a disk is full. Call it last."""
    is_written = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            is_written = False
            with contextlib.suppress(OSError, ValueError):  # Python flushes once more at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return is_written


def leave(code: int) -> NoReturn:
    """End this process at once, once what it has printed is written, with `code`, or 1 where that cannot be written.

    Threads at work are left where they are, and what libraries do at exit is not done: an interpreter that winds up
    beside a thread that loads libraries or waits for a store may wait for it, or never end.
    """
    os._exit(code if close_streams() else code or 1)


def has_reader(stream: TextIO) -> bool:
    """Whether a stream has a reader; False for a pipe whose other end was closed, as by `head`."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return True


def shown(text: str, stream: TextIO) -> str:
    """`text` as the stream can show it: other characters become plain ones, or escapes."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, _replacing()).decode(encoding)


@cache
def _replacing() -> str:
    """The name of the registered error handler for characters that an encoding lacks."""

    def replaced(error: UnicodeError) -> tuple[str | bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        signs = error.object[error.start : error.end]
        return "".join(
            _PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs
        ), error.end

    codecs.register_error("convmae", replaced)
    return "convmae"


def say(line: str) -> None:
    """Print one line."""
    write_line(sys.stdout, line)


def write_line(stream: TextIO, line: str) -> None:
    """Write one line as the stream can show it, without control characters."""
    stream.write(shown(printable(line), stream) + "\n")
    stream.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below the names of their columns; cells are plain text, whatever they contain."""
    table = Table(*columns, box=None, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if table.rows:
        Console(highlight=False).print(table)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print fields and values, aligned."""
    rows = list(pairs)
    width = max(len(field) for field, _ in rows)
    for field, value in rows:
        say(f"{field:<{width}}  {value}".rstrip())


def print_json(value: object) -> None:
    """Print one JSON document, with control characters escaped."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
    sys.stdout.flush()


def whole_lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in pieces, without their ends; each as soon as it is complete."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest


def figure(value: float | None, form: str) -> str:
    """A number in a format, or `-` if there is none yet."""
    return "-" if value is None else format(value, form)


def bytes_text(count: float) -> str:
    """Bytes in decimal units, with three digits: `47.4 kB`, `3.69 MB`, `148 GB`."""
    power = 0
    while count >= 999.5 and power < len(_BYTE_UNITS) - 1:
        count, power = count / 1000, power + 1
    decimals = 0 if not power else max(0, 3 - len(str(int(count))))
    return f"{count:.{decimals}f} {_BYTE_UNITS[power]}"


def duration_text(seconds: float | None) -> str:
    """Seconds as `3d 04h`, `2h 05m`, `4m 03s` or `9s`."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    return f"{minutes}m {second:02d}s" if minutes else f"{second}s"


def parsed_bytes(field: str, text: str) -> int:
    """`256MB`, `1GiB` or `100000` as a number of bytes.

    Raises:
        UserError: It has none of these forms.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?))?B?", text.strip())
    if not match:
        raise UserError(field, "must be a number of bytes", clipped(text), "write it like 256MB, 1GiB or 100000")
    base = 1024 if match[3] else 1000
    count = float(match[1]) * base ** (" KMGT".index(match[2].upper()) if match[2] else 0)
    if count > MOST_BYTES:
        raise UserError(field, f"must be at most {MOST_BYTES} bytes", clipped(text), "write it like 256MB or 1GiB")
    return int(count)


def status_text(status: Mapping[str, Any]) -> str:
    """The state and figures of a run in one line."""
    parts = [str(status.get("state", "unknown"))]
    if (loss := status.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (rate := status.get("images_per_second")) is not None:
        parts.append(f"{rate:.0f} images/s")
    if (world_size := status.get("world_size")) is not None:
        parts.append(f"{world_size} workers")
    if status.get("restarts"):
        parts.append(f"{status['restarts']} restarts")
    if status.get("probes_left"):
        parts.append(f"{status['probes_left']} probes left")
    elif (eta := status.get("eta_seconds")) is not None:
        parts.append(f"ETA {duration_text(eta)}")
    return " · ".join(parts)


@contextmanager
def progress_bar(title: str, stream: TextIO | None = None) -> Iterator[ShowProgress]:
    """Show progress while the context is open; yields `show(done, total, text)`.

    On a terminal, a bar is redrawn in place; elsewhere, a line is written every ten seconds and at the end.

    Args:
        title: What progresses.
        stream: Where to show it; default: standard output.
    """
    stream = stream or sys.stdout
    if isinstance(stream, DrawnElsewhere):
        with stream.progress_bar(title) as there:
            yield there
        return
    if not stream.isatty():
        yield _line_writer(title, stream)
        return
    fit_signs(stream)
    # Two lines, so that neither the bar nor the figures are cut on a narrow terminal.
    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn())
    task = progress.add_task(title, total=None)
    with Live(Group(progress, Text("")), console=Console(file=stream), refresh_per_second=4) as live:

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total or None)
            live.update(Group(progress, Text(printable(text))))

        yield show


def _line_writer(title: str, stream: TextIO) -> ShowProgress:
    last_at, last_line = -LOG_INTERVAL_SECONDS, ""

    def show(done: int, total: int, text: str) -> None:
        nonlocal last_at, last_line
        line, now = f"{title} {done}/{total} {text}", time.monotonic()
        if line != last_line and (now - last_at >= LOG_INTERVAL_SECONDS or done == total):
            write_line(stream, line)
            last_at, last_line = now, line

    return show
