"""The monitor of a live run: history, events, heartbeat and metrics, in one actor beside the driver.

Workers come and go; this stays. Rank 0 reports every step without waiting; a thread writes to storage, so an object
store that is unreachable delays no step until the next checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import RunError
from jobs.monitor.group_reports import GroupReports
from jobs.monitor.rank_reports import RankReports
from jobs.monitor.run_memory import Clock, MonitorConfig
from jobs.monitor.settings import Settings
from jobs.rank.watchdog import examined_on_its_node
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.run.probe_rows import PROBE_EVENT, ProbeCurve

logger = logging.getLogger(__name__)

WATCH_INTERVAL_SECONDS = 1.0


class RunMonitor(RankReports, GroupReports):
    """Record of one run. A plain class: jobs.control.driver makes an actor of it; tests call it directly.

    Owns: three threads, that flush, compact, and look for hangs; all else is `RunMemory`, and the threads of trackers
        and notices.
    Failure: dies with its process; a new one continues from the run directory. What was unwritten is of steps after
        the last commit (`flush` precedes every commit): rank 0 sees the death and fails, and they are done again.
    """

    def __init__(self, config: MonitorConfig, clock: Clock | None = None) -> None:
        """Open the run directory, serve metrics, and start the threads."""
        super().__init__(config, clock or Clock())
        self._outcome = ""
        if config.targets_folder:
            self._figures.announce(Path(config.targets_folder))
        threading.Thread(target=self._flush_forever, name="monitor-flush", daemon=True).start()
        threading.Thread(target=self._watch_forever, name="monitor-watch", daemon=True).start()
        threading.Thread(target=self._compact_forever, name="monitor-compact", daemon=True).start()

    def consolidated(self, *, step: int, url: str, size_bytes: int, seconds: float) -> None:
        """Note that the weights of a step were written."""
        with self._lock:
            self._add_event("consolidated", step=step, url=url, bytes=size_bytes, duration_seconds=round(seconds, 3))

    def consolidation_failed(self, *, step: int, error: str) -> None:
        """Note a step whose weights could not be written; training continues."""
        with self._lock:
            self._figures.count("consolidation_failures")
            self._add_event("consolidation-failed", step=step, reason=error)

    def probed(self, step: int, fields: Mapping[str, Any]) -> None:
        """Note the accuracies at a step; returns when storage has them, since nobody measures them again."""
        with self._lock:
            if any((event["step"], event["plan"]) == (step, fields["plan"]) for event in self._probed):
                return  # whoever reports did not get the answer
            self._probed.append(self._add_event(PROBE_EVENT, step=step, **fields))
            self._figures.count("probes")
            self._figures.update(probe_seconds=fields["duration_seconds"])
            self._figures.probed(ProbeCurve.of(self._probed))
        self.flush()

    def probe_failed(self, step: int, error: str) -> None:
        """Note a step whose weights could not be probed; training continues."""
        with self._lock:
            self._figures.count("probe_failures")
            self._add_event("probe-failed", step=step, reason=error)

    def trained(self) -> None:
        """Note that all ranks have returned: they are silent from now on, while what is left is done."""
        with self._lock:
            self._watch.end()
            self._figures.trained()

    def change_settings(self, changes: Mapping[str, Sequence[Any]]) -> None:
        """Follow the run's changed recipe; the ranks do from their next attempt on, which begins when they have saved.

        Args:
            changes: The value before and after, by field.
        """
        recipe = self._config.run.read_recipe()
        text = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in sorted(changes.items()))
        with self._lock:
            self._settings.changed(recipe, text)
            self._saves.follow(IntervalRule.of(recipe))
            self._failures.allow(recipe.max_restarts_without_progress)
            self._figures.update(
                target_world_size=recipe.max_workers,
                checkpoint_every_steps=None if self._saves.seconds is not None else recipe.checkpoint_every_steps,
                checkpoint_interval_seconds=self._saves.seconds,
            )
            self._add_event("set", step=self._figures["step"], reason=text)

    def settings(self) -> Settings:
        """What the controller should follow by now."""
        with self._lock:
            return self._settings.now()

    def request_stop(self, reason: str) -> None:
        """Ask the run to save a checkpoint and end after the current step."""
        with self._lock:
            self._instructions.stop(reason)
            self._figures.stop_asked()
            self._record.touch()

    def end(self, outcome: str, reason: str = "") -> None:
        """Note that the run is `finished`, `stopped` or `failed`, and write everything.

        Trackers and webhook have a minute together to take what is left.
        """
        with self._lock:
            self._outcome = outcome
            self._watch.end()
            self._figures.ended(outcome)
            self._add_event(outcome, step=self._figures["step"], reason=reason or self._instructions.stop_reason)
        self.flush()
        self._trackers.end(outcome)
        if self._notifier:
            self._notifier.end()
        self.flush()  # what these two report
        if outcome != "failed" and self._config.targets_folder:
            self._figures.withdraw(Path(self._config.targets_folder))

    def _flush_forever(self) -> None:
        while not self._outcome:
            time.sleep(self._config.flush_seconds)
            try:
                self.flush()
                if changes := self._config.run.take_set_request():
                    self.change_settings(changes)
                if self._config.run.take_stop_request():
                    self.request_stop("asked by `convmae stop`")
                self._take_profile_request()
            except Exception:
                logger.warning("history, events and heartbeat could not be written; trying again", exc_info=True)

    def _take_profile_request(self) -> None:
        try:
            request = self._config.run.take_profile_request()
        except RunError as error:
            logger.warning("%s", error)
            return
        if request:
            self.ask_profile(request)

    def _watch_forever(self) -> None:
        while not self._outcome:
            time.sleep(WATCH_INTERVAL_SECONDS)
            self.look_for_hangs(self._clock.monotonic(), examined_on_its_node)

    def _compact_forever(self) -> None:
        done: tuple[int, int] | None = None
        while not self._outcome:
            time.sleep(self._config.compact_seconds)
            try:
                if (settled := self.settled()) != done:
                    self.compact(*settled)
                    done = settled
            except Exception:
                logger.warning("history, events and quarantine could not be compacted; trying again", exc_info=True)
