"""The thread that keeps one tracker up to date without the run waiting for it."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import PROBE_EVENT
from jobs.trackers.event_log import EventLog
from jobs.trackers.tracker import CHUNK_POINTS, Point, TrackedRun, Tracker, TrackerKind
from jobs.trackers.variables import without_secrets
from pipeline.errors import clipped
from pipeline.printable import printable

logger = logging.getLogger(__name__)

MOST_WAITING = 20_000
"""Steps that are kept for a tracker that is away, about a kilobyte each; older ones are read from the history."""
SEND_SECONDS = 10.0
MOST_PAUSE_SECONDS = 60.0
"""Between tries while a tracker is away."""
LOST_EVENT = "tracker-lost"
BACK_EVENT = "tracker-back"

Report = Callable[[str, str], None]
"""Adds an event to the run: its kind, and the reason."""


@dataclass(frozen=True)
class FedRun:
    """What a feed needs to know of its run."""

    directory: RunDirectory
    recipe: Mapping[str, Any]
    """Flat: `model.<field>`."""
    environ: Mapping[str, str]
    """Variables of trackers; may hold secrets."""
    global_batch_size: int
    send_seconds: float = SEND_SECONDS
    most_waiting: int = MOST_WAITING


@dataclass(frozen=True)
class _Rewind:
    """Steps after this one come again."""

    step: int


class TrackerFeed:
    """Sends one tracker the rows and events of a run, each once, in a thread of its own.

    Owns: what was not sent yet. How much was is kept in the run directory, for the next driver.
    Concurrency: `see_row` and `see_event` never wait, so they may be called under a lock; `report` is called without
        any of this object's.
    Failure: what a tracker raises is reported once, until it is back. Then it gets what it lacks: the newest
        `most_waiting` steps as they were, older ones and those of an earlier driver from the history, which has no
        gradient norms.
    """

    def __init__(
        self, name: str, kind: TrackerKind, run: FedRun, events: Iterable[Mapping[str, Any]], report: Report
    ) -> None:
        """Start the thread.

        Args:
            name: Of the tracker.
            kind: Opens it.
            run: The run.
            events: All of its events so far.
            report: Takes what becomes of the tracker.
        """
        self._name, self._kind, self._run, self._report = name, kind, run, report
        self._lock = threading.Lock()
        self._waiting: deque[Point | _Rewind] = deque()
        self._probes: list[Point] = []
        self._log = EventLog()
        self._has_gap = True  # what earlier drivers left is read from the history
        self._lost_rewind: int | None = None
        self._outcome = ""
        self._wake, self._done, self._given_up = threading.Event(), threading.Event(), threading.Event()
        # Of the thread alone:
        self._tracker: Tracker | None = None
        self._taken: list[Point] = []
        self._rewind: _Rewind | None = None
        self._kept: dict[str, Any] = {}
        self._written: dict[str, Any] = {}
        self._sent_log = ""
        self._is_lost = False
        for event in events:
            self._note(event)
        threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True).start()

    def see_row(self, row: Mapping[str, Any], gradient_norm: float | None) -> None:
        """Take the history row of a step, and the norm of its gradient."""
        point = Point.of_row(row, time.time(), self._run.global_batch_size, gradient_norm)
        with self._lock:
            self._put(point)

    def see_event(self, event: Mapping[str, Any]) -> None:
        """Take an event; one that begins an attempt says from where on the run is done again."""
        with self._lock:
            self._note(event)
            if "steps_redone" in event:
                self._put(_Rewind(int(event["step"])))

    def end(self, outcome: str) -> None:
        """Have what is left sent, and then the outcome; returns at once."""
        self._outcome = outcome
        self._wake.set()

    def leave(self, seconds: float) -> None:
        """Wait for what `end` began, that many seconds; report what the tracker then lacks."""
        if not self._done.wait(seconds):
            self._given_up.set()
            self._wake.set()
            reason = f"{self._name} lacks the end of the run, for which it was given {seconds:.0f} s"
            self._report(LOST_EVENT, reason)

    def _note(self, event: Mapping[str, Any]) -> None:
        self._log.add(event)
        if event["kind"] == PROBE_EVENT:
            self._probes.append(Point.of_probe(event))

    def _put(self, item: Point | _Rewind) -> None:
        self._waiting.append(item)
        if len(self._waiting) > self._run.most_waiting:
            dropped = self._waiting.popleft()
            self._has_gap = True
            if isinstance(dropped, _Rewind):
                known = self._lost_rewind
                self._lost_rewind = dropped.step if known is None else min(known, dropped.step)

    def _work(self) -> None:
        pause_seconds = self._run.send_seconds
        while not self._done.is_set():
            self._wake.wait(pause_seconds)
            self._wake.clear()
            if self._given_up.is_set():
                return
            try:
                self._deliver(self._outcome)
            except Exception as error:  # whatever a library raises, the run continues
                self._lose(error)
                pause_seconds = min(2 * pause_seconds, MOST_PAUSE_SECONDS) if not self._outcome else 1.0
            else:
                pause_seconds = self._run.send_seconds

    def _deliver(self, outcome: str) -> None:
        """Send all that waits; after an outcome nothing more comes."""
        tracker = self._tracker or self._open()
        while self._take():
            if self._has_gap:
                tracker = self._fill_gap(tracker)
            if self._rewind:
                tracker = self._go_back(tracker, self._rewind.step)
                self._rewind = None
            self._send(tracker, [point for point in self._taken if point.step > self._kept["step"]])
            self._taken = []
        self._keep()
        if self._is_lost:
            self._is_lost = False
            self._report(BACK_EVENT, f"{self._name} takes figures again, and has those of the meantime")
        if outcome:
            tracker.end(outcome)
            self._done.set()

    def _take(self) -> bool:
        """Take steps out of the queue, up to where an attempt begins; whether there is anything to do."""
        with self._lock:
            while self._waiting and not self._rewind and len(self._taken) < CHUNK_POINTS // 2:
                if isinstance(self._waiting[0], _Rewind):
                    if not self._taken:
                        self._rewind = self._waiting.popleft()  # type: ignore[assignment]
                    break
                self._taken.append(self._waiting.popleft())  # type: ignore[arg-type]
            is_new = self._log.text() != self._sent_log or bool(self._new_probes())
            return bool(self._taken or self._rewind or self._has_gap or is_new)

    def _new_probes(self) -> list[Point]:
        return [probe for probe in self._probes if probe.at_seconds > self._kept["at_seconds"]][: CHUNK_POINTS // 2]

    def _open(self) -> Tracker:
        directory = self._run.directory
        if not self._kept:
            self._kept = directory.read_tracked(self._name)
        if not self._kept:
            self._kept = {"id": f"{directory.name}-{secrets.token_hex(4)}", "step": 0, "at_seconds": 0.0}
            directory.write_tracked(self._name, self._kept)  # before there is a run of this id
        run = TrackedRun(self._kept["id"], directory, self._run.recipe, self._run.environ, self._kept["step"])
        tracker, self._sent_log = self._kind.open(run), ""
        if tracker.last_step is not None and tracker.last_step != self._kept["step"]:
            self._has_gap = self._has_gap or tracker.last_step < self._kept["step"]
            self._kept |= {"step": tracker.last_step} | ({} if tracker.last_step else {"at_seconds": 0.0})
        self._tracker = tracker
        return tracker

    def _go_back(self, tracker: Tracker, step: int) -> Tracker:
        """The tracker after an attempt has resumed from `step`."""
        if not self._kind.forgets or step >= self._kept["step"]:
            return tracker
        self._kept["step"] = step
        self._leave()
        return self._open()

    def _fill_gap(self, tracker: Tracker) -> Tracker:
        """Send from the history what lies between the tracker's last step and the first that waits."""
        with self._lock:
            self._has_gap = False
            rewind, self._lost_rewind = self._lost_rewind, None
            first = next((item for item in chain(self._taken, self._waiting) if isinstance(item, Point)), None)
        try:
            if rewind is not None:
                tracker = self._go_back(tracker, rewind)
            rows = self._run.directory.read_history(after=self._kept["step"])
            before = [row for row in rows if first is None or row["step"] < first.step]
            points = _points_until(first.at_seconds if first else time.time(), before, self._run.global_batch_size)
            for start in range(0, len(points), CHUNK_POINTS // 2):
                self._send(tracker, points[start : start + CHUNK_POINTS // 2])
        except BaseException:
            self._has_gap = True
            raise
        return tracker

    def _send(self, tracker: Tracker, points: Sequence[Point]) -> None:
        with self._lock:
            probes, log = self._new_probes(), self._log.text()
        if points or probes or log != self._sent_log:
            step = points[-1].step if points else self._kept["step"]
            tracker.send([*probes, *points], step, log if log != self._sent_log else "")
            self._kept["step"] = step
        if probes:
            self._kept["at_seconds"] = probes[-1].at_seconds
        self._sent_log = log

    def _keep(self) -> None:
        if self._kept == self._written:
            return
        try:
            self._run.directory.write_tracked(self._name, self._kept)
        except OSError as error:  # written with what is sent next
            logger.warning("what %s has could not be noted: %s", self._name, error)
        else:
            self._written = dict(self._kept)

    def _leave(self) -> None:
        left, self._tracker = self._tracker, None
        if left:
            with contextlib.suppress(Exception):  # what has just failed may fail again
                left.leave()

    def _lose(self, error: Exception) -> None:
        self._leave()
        text = without_secrets(f"{type(error).__name__}: {error}", self._run.environ)
        logger.warning("%s takes no figures: %s", self._name, text)
        if not self._is_lost:
            self._is_lost = True
            reason = f"{self._name} takes no figures, and gets them later: {printable(clipped(text))}"
            self._report(LOST_EVENT, reason)


def _points_until(at_seconds: float, rows: Sequence[Mapping[str, Any]], global_batch_size: int) -> list[Point]:
    """The points of history rows, which have no time: each is that of the next, less the time of its step."""
    points = []
    for row in reversed(rows):
        at_seconds -= row.get("step_seconds", 0.0)
        points.append(Point.of_row(row, at_seconds, global_batch_size))
    return points[::-1]
