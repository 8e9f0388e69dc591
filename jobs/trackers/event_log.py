"""The newest events of a run as a list in Markdown, for trackers that keep notes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import clipped
from pipeline.printable import printable

MOST_EVENTS = 100
MOST_CHARACTERS = 4000
"""MLflow takes 5,000 in a note."""


class EventLog:
    """The newest lines, the newest first."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MOST_EVENTS)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next event."""
        at = datetime.fromtimestamp(event["at_seconds"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        reason = f": {printable(clipped(event['reason']))}" if event.get("reason") else ""
        self._lines.appendleft(f"- {at} UTC, attempt {event['attempt']}, step {event['step']}: {event['kind']}{reason}")

    def text(self) -> str:
        """As many whole lines as `MOST_CHARACTERS` hold; empty before the first event."""
        text = ""
        for line in self._lines:
            if len(text) + len(line) + 1 > MOST_CHARACTERS:
                break
            text += f"{line}\n"
        return text
