"""Frames: a command's output as lines of JSON, so that it is shown elsewhere as it would have been shown here.

The log of a Ray job is one stream for standard output, standard error and whatever Ray prints. A command that runs as a
job (jobs.cli.command_job) writes frames into it: text for either stream, progress, and its exit code. The process that
submitted it (jobs.remote.command) replays them; all other lines of the log are Ray's own.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from jobs.terminal import ShowProgress, ShowStatus, progress_bar, shown

KEY = "convmae"
"""Key of a frame's number: every frame begins with it, and no other line does."""
CALLER_VARIABLE = "CONVMAE_CALLER"
"""In the job's environment: what it needs to know of the caller's terminal and files, as JSON."""
PIECE_CHARACTERS = 4000
"""Most characters of text in a frame; Ray passes a log on in pieces of 20,000 characters."""
PROGRESS_SECONDS = 0.5
"""Between two frames of one progress bar."""

Stream = Literal["out", "err"]


class FrameWriter:
    """Writes the frames of one command. Thread-safe.

    Owns: the number of the next frame, by which a reader that starts again knows what it has shown.
    """

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._number = 0

    def text(self, stream: Stream, text: str) -> None:
        """Text for one of the two streams."""
        for start in range(0, len(text), PIECE_CHARACTERS):
            self._write({stream: text[start : start + PIECE_CHARACTERS]})

    def progress(self, stream: Stream, title: str, figures: tuple[int, int, str] | None) -> None:
        """Progress of a task; None closes its bar."""
        self._write({"progress": title, "on": stream, "figures": figures})

    def status(self, stream: Stream, status: Mapping[str, Any] | None) -> None:
        """A run's status, to be drawn over the last one; None ends the display."""
        self._write({"status": status, "on": stream})

    def exit(self, code: int) -> None:
        """The command's exit code, at its end."""
        self._write({"exit": code})

    def _write(self, content: dict[str, Any]) -> None:
        with self._lock:
            self._sink.write(json.dumps({KEY: self._number, **content}) + "\n")
            self._sink.flush()
            self._number += 1


class FrameStream(io.TextIOBase):
    """Standard output or standard error of a command that runs as a job."""

    def __init__(self, writer: FrameWriter, name: Stream, *, is_terminal: bool) -> None:
        """Make the stream.

        Args:
            writer: Shared by both streams.
            name: Which of them this is.
            is_terminal: Whether the stream is a terminal where the command was typed.
        """
        self._writer, self._name, self._is_terminal = writer, name, is_terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Accepts all characters; the process that shows them replaces those that it cannot show."""
        return "utf-8"

    def isatty(self) -> bool:
        """Whether the text is shown on a terminal."""
        return self._is_terminal

    def writable(self) -> bool:
        """Always true."""
        return True

    def write(self, text: str) -> int:
        """Pass text on."""
        self._writer.text(self._name, text)
        return len(text)

    @contextmanager
    def progress_bar(self, title: str) -> Iterator[ShowProgress]:
        """Show progress where the command was typed; gives `show(done, total, text)`."""
        shown_at = float("-inf")

        def show(done: int, total: int, text: str) -> None:
            nonlocal shown_at
            now = time.monotonic()
            if now - shown_at >= PROGRESS_SECONDS or done == total:
                self._writer.progress(self._name, title, (done, total, text))
                shown_at = now

        try:
            yield show
        finally:
            self._writer.progress(self._name, title, None)

    @contextmanager
    def live_status(self) -> Iterator[ShowStatus]:
        """Draw a run's status where the command was typed."""
        try:
            yield lambda status: self._writer.status(self._name, status)
        finally:
            self._writer.status(self._name, None)


@dataclass(frozen=True)
class Frame:
    """One frame of a command, as read from the log."""

    number: int
    content: dict[str, Any]

    @classmethod
    def of(cls, line: str) -> Frame | None:
        """Read a line; None if it is not a frame."""
        if not line.startswith(f'{{"{KEY}": '):
            return None
        try:
            content = json.loads(line)
        except ValueError:
            return None
        return cls(content.pop(KEY), content)


class Replay:
    """Shows a command's frames on this process's streams.

    Owns: the open progress bars. Use it as a context, which closes them.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self.exit_code: int | None = None
        self._streams: dict[str, TextIO] = {"out": out, "err": err}
        self._next = 0
        self._bars: dict[str, tuple[ExitStack, ShowProgress]] = {}
        self._status: tuple[ExitStack, ShowStatus] | None = None

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exception: object) -> None:
        for title in list(self._bars):
            self._close(title)
        self._close_status()

    def show(self, frame: Frame) -> None:
        """Show a frame, unless it has been shown before."""
        if frame.number < self._next:
            return
        self._next = frame.number + 1
        content = frame.content
        if "exit" in content:
            self.exit_code = int(content["exit"])
        elif "progress" in content:
            self._progress(content["progress"], self._streams[content["on"]], content["figures"])
        elif "status" in content:
            self._draw(self._streams[content["on"]], content["status"])
        else:
            ((name, text),) = content.items()
            stream = self._streams[name]
            stream.write(shown(text, stream))
            stream.flush()

    def _progress(self, title: str, stream: TextIO, figures: list[Any] | None) -> None:
        if figures is None:
            self._close(title)
            return
        if title not in self._bars:
            stack = ExitStack()
            self._bars[title] = stack, stack.enter_context(progress_bar(title, stream))
        done, total, text = figures
        self._bars[title][1](done, total, text)

    def _close(self, title: str) -> None:
        if title in self._bars:
            self._bars.pop(title)[0].close()

    def _draw(self, stream: TextIO, status: Any) -> None:
        if status is None:
            self._close_status()
            return
        if self._status is None:
            from jobs.report.watch import status_display  # which imports torch

            stack = ExitStack()
            self._status = stack, stack.enter_context(status_display(as_json=False, stream=stream))
        self._status[1](status)

    def _close_status(self) -> None:
        if self._status is not None:
            self._status[0].close()
            self._status = None
