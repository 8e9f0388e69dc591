"""Parts of a page that are made again while somebody looks at it, at most every few seconds however many look."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.errors import clipped
from pipeline.printable import printable

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 3.0
"""Between two makings, at least."""
MOST_SHARE = 0.25
"""Of a core's time that is spent on making them."""
IDLE_SECONDS = 30.0
"""Nobody has asked for so long: what makes them is closed."""
STORE_SECONDS = 5.0
"""A page has less patience with a store than a run: it says that it is old."""
LATE_SECONDS = 20.0
"""What is shown is called old from this age on."""


@dataclass(frozen=True)
class Drawn:
    """Some parts, as they were made together."""

    parts: Mapping[str, str]
    """HTML by name."""
    read_at_seconds: float
    """Unix time of what they show."""
    fault: str = ""
    """Why that is not now; text."""


class Drawer(Protocol):
    """Makes the parts of one page."""

    def draw(self) -> Iterable[Drawn]:
        """All of them, in pieces: what is quickly made comes first.

        Raises:
            Exception: Nothing can be shown.
        """

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(frozen=True)
class Snapshot:
    """What can be shown at one moment."""

    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Digest and HTML by name."""
    read_at_seconds: float = 0.0
    """Unix time of the newest; 0: there is nothing yet."""
    fault: str = ""

    def with_drawn(self, drawn: Drawn) -> Snapshot:
        """The same with newer parts."""
        made = {name: (_digest(name, html), html) for name, html in drawn.parts.items()}
        return Snapshot({**self.parts, **made}, drawn.read_at_seconds, drawn.fault)

    def age_text(self, now_seconds: float) -> str:
        """What a reader should know of its age; empty while it is fresh."""
        if not self.read_at_seconds:
            return self.fault or "Reading ..."
        age = max(0.0, now_seconds - self.read_at_seconds)
        if not self.fault and age < LATE_SECONDS:
            return ""
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.read_at_seconds))
        old = f"What is shown is old: of {at} UTC, {age:.0f} s ago."
        return f"{old} {self.fault}" if self.fault else old


class LiveParts:
    """The newest parts of one page, for any number of threads that serve it.

    Owns: a thread that makes them, and what it makes them with; both only while somebody asks.
    Concurrency: a lock guards the snapshot; parts are made outside of it.
    Failure: what cannot be made again stays as it was, and the snapshot says why.
    Blocking: never; who asks gets what there is.
    """

    def __init__(self, opened: Callable[[], Drawer], name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Make nothing yet.

        Args:
            opened: Gives what makes them; never fails.
            name: Of the thread.
            clock: Monotonic seconds.
        """
        self._opened, self._name, self._clock = opened, name, clock
        self._lock = threading.Lock()
        self._snapshot = Snapshot()
        self._asked_at = 0.0
        self._is_made = False

    def snapshot(self) -> Snapshot:
        """What there is; newer ones are being made."""
        with self._lock:
            self._asked_at = self._clock()
            if not self._is_made:
                self._is_made = True
                threading.Thread(target=self._make, name=self._name, daemon=True).start()
            return self._snapshot

    def _make(self) -> None:
        drawer = self._opened()
        try:
            while True:
                began = self._clock()
                self._make_once(drawer)
                spent = self._clock() - began
                time.sleep(max(REFRESH_SECONDS, spent / MOST_SHARE) - spent)
                while self._asked_at < began:  # nobody has looked since
                    if self._ends():
                        return
                    time.sleep(REFRESH_SECONDS / 10)
        finally:
            drawer.close()

    def _ends(self) -> bool:
        with self._lock:
            ends = self._clock() - self._asked_at > IDLE_SECONDS
            self._is_made = not ends  # the next to ask starts another thread
        return ends

    def _make_once(self, drawer: Drawer) -> None:
        try:
            for drawn in drawer.draw():
                self._show(self._snapshot.with_drawn(drawn))
        except Exception as error:  # of a store, of a damaged file, of a chart: the page says so and tries again
            logger.debug("a page could not be made", exc_info=True)
            self._show(replace(self._snapshot, fault=fault_text(error)))

    def _show(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._snapshot = snapshot


def fault_text(error: Exception) -> str:
    """An error in a line."""
    return clipped(printable(str(error) or type(error).__name__), 500)


def _digest(name: str, html: str) -> str:
    """Of a part: two that are empty are not the same."""
    return hashlib.blake2b(f"{name}\n{html}".encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
