"""The thread that delivers the notices of a run without the run waiting for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.notices.notice_rules import Notice, NoticeRules
from jobs.notices.webhook import ANSWER_SECONDS, UndeliveredError, Webhook
from jobs.run.directory import RunDirectory
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

MOST_WAITING = 100
"""Notices that wait for a webhook that is away; of more the oldest are given up."""
FAILED_EVENT = "notice-failed"


@dataclass(frozen=True)
class Patience:
    """How long a webhook that does not take notices is tried."""

    answer_seconds: float = ANSWER_SECONDS
    first_pause_seconds: float = 1.0
    """Between the first two tries; each further one is twice as long."""
    most_pause_seconds: float = 60.0
    notice_seconds: float = 3600.0
    """After which a notice is given up."""
    end_seconds: float = 30.0
    """For which the end of a run waits for what is left."""


class Notifier:
    """Notifies people of what the rules find in a run's events, each once in the life of the run.

    Owns: notices that wait. Up to which event there is nothing left to deliver, is kept in the run directory, so the
        next driver delivers what this one could not. Where the process is killed between a delivery and that note, a
        notice comes twice.
    Concurrency: `see_event` never waits, so it may be called under a lock; `report` is called without any of this
        object's.
    Failure: a notice that is refused, or not taken for `Patience.notice_seconds`, is an event.
    """

    def __init__(
        self,
        webhook: Webhook,
        directory: RunDirectory,
        events: Iterable[Mapping[str, Any]],
        report: Callable[[str, str], None],
        patience: Patience,
    ) -> None:
        """Start the thread.

        Args:
            webhook: Where they go.
            directory: Of the run.
            events: All of its events so far.
            report: Takes a notice that is given up: the kind of an event, and the reason.
            patience: How long what is tried.
        """
        self._webhook, self._directory, self._report = webhook, directory, report
        self._patience = patience
        self._rules = NoticeRules()
        self._lock = threading.Lock()
        self._waiting: deque[Notice] = deque(maxlen=MOST_WAITING)
        known = list(events)
        self._waiting.extend(notice for event in known if (notice := self._rules.see(event)))
        self._newest_at = max((float(event["at_seconds"]) for event in known), default=0.0)
        self._wake, self._is_ending, self._done = threading.Event(), threading.Event(), threading.Event()
        self._given_up = threading.Event()
        self._why = "nothing was answered yet"
        threading.Thread(target=self._work, name="notices", daemon=True).start()

    def see_event(self, event: Mapping[str, Any]) -> None:
        """Take an event."""
        with self._lock:
            if notice := self._rules.see(event):
                self._waiting.append(notice)
                self._wake.set()

    def end(self) -> None:
        """Deliver what is left, as far as `Patience.end_seconds` allow, and report the rest."""
        self._is_ending.set()
        self._wake.set()
        if self._done.wait(self._patience.end_seconds):
            return
        self._given_up.set()
        with self._lock:
            left = list(self._waiting)
        if left:
            self._keep(left[-1].at_seconds)  # nobody waits for them any more
            kinds = ", ".join(notice.kind for notice in left)
            self._report(FAILED_EVENT, f"not delivered when the run ended: {kinds}; {self._why}")

    def _work(self) -> None:
        self._begin()
        pause_seconds, since = self._patience.first_pause_seconds, time.monotonic()
        while not self._given_up.is_set():
            with self._lock:
                notice = self._waiting[0] if self._waiting else None
            if notice is None:
                if self._is_ending.is_set():
                    self._done.set()
                    return
                self._wake.wait()
                self._wake.clear()
                pause_seconds, since = self._patience.first_pause_seconds, time.monotonic()
                continue
            try:
                self._webhook.post(notice, self._patience.answer_seconds)
            except UndeliveredError as error:
                self._why = str(error)
                logger.warning("notice %s: %s", notice.kind, error)
                if not error.is_final and time.monotonic() - since < self._patience.notice_seconds:
                    self._pause(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, self._patience.most_pause_seconds)
                    continue
                self._report(FAILED_EVENT, f"{notice.kind} of step {notice.step} was not delivered: {error}")
            with self._lock:
                if self._waiting and self._waiting[0] is notice:
                    self._waiting.popleft()
            self._keep(notice.at_seconds)
            pause_seconds, since = self._patience.first_pause_seconds, time.monotonic()

    def _pause(self, seconds: float) -> None:
        if self._is_ending.is_set():  # as often as it may be, in the time that is left
            time.sleep(self._patience.first_pause_seconds)
        else:
            self._is_ending.wait(seconds)

    def _begin(self) -> None:
        """Leave out what was delivered already, and what lies before the first driver that notified anybody."""
        try:
            kept = self._directory.read_notified()
        except (OSError, UserError) as error:
            logger.warning("up to where people were notified is not known: %s", error)
            kept = {}
        after = kept.get("at_seconds", self._newest_at)
        if not kept:
            self._keep(after)
        with self._lock:
            while self._waiting and self._waiting[0].at_seconds <= after:
                self._waiting.popleft()

    def _keep(self, at_seconds: float) -> None:
        try:
            self._directory.write_notified({"at_seconds": at_seconds})
        except OSError as error:
            logger.warning("that people were notified could not be noted: %s", error)
