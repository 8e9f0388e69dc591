"""The memory of a live run, in the monitor's process: its record, figures and instructions, under one lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.checkpoint.checkpoint import CLAIMS
from jobs.checkpoint.held.held_checkpoint import HeldCheckpoint, end_holders
from jobs.health.stragglers import StragglerWatch
from jobs.metrics.exporter import RunExporter
from jobs.metrics.recovery import Recovery
from jobs.metrics.run_figures import RunFigures
from jobs.metrics.speed_watch import SpeedWatch
from jobs.monitor.checkpoint_clock import CheckpointClock
from jobs.monitor.failures import Failures
from jobs.monitor.settings import ChangedSettings
from jobs.notices.notifier import Notifier, Patience
from jobs.notices.webhook import Webhook
from jobs.rank.watchdog import HangWatch
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.recipe.schedule import Schedule
from jobs.report.live.live_figures import LiveFigures
from jobs.report.live.run_pages import run_pages
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import PROBE_EVENT, ProbeCurve
from jobs.run.profile_request import ProfileRequest
from jobs.run.record import RunRecord
from jobs.step.instruction import Instructions
from jobs.trackers.trackers import Trackers, TrackerSettings
from pipeline.store.lease import current_lease

FLUSH_INTERVAL_SECONDS = 2.0
"""Between heartbeats; each is one PUT."""
COMPACT_INTERVAL_SECONDS = 60.0
"""Between two looks whether anything has settled; if so, each lists three folders."""


@dataclass(frozen=True)
class Clock:
    """The time; a test gives another."""

    wall: Callable[[], float] = time.time
    """Unix seconds."""
    monotonic: Callable[[], float] = time.monotonic
    """Seconds that never go back."""


@dataclass(frozen=True)
class MonitorConfig:
    """What a monitor needs to know of its run."""

    run: RunDirectory
    schedule: Schedule
    global_batch_size: int
    max_restarts_without_progress: int
    target_world_size: int
    """Ranks that the run takes where there is room for them."""
    checkpoint_interval: IntervalRule
    device: str
    """`cuda` or `cpu`: what a rank-hour is an hour of."""
    hang_seconds: float
    host: str
    metrics_port: int
    targets_folder: str
    """Folder that the local Prometheus watches; empty: none."""
    straggler_factor: float
    """Of the recipe, as the next."""
    leave_out_stragglers: bool
    claim: int
    """Number of the lease under which the driver works."""
    trackers: TrackerSettings = field(default_factory=TrackerSettings)
    webhook: Webhook | None = None
    """Where notices go; None: nowhere."""
    patience: Patience = field(default_factory=Patience)
    """With that webhook."""
    flush_seconds: float = FLUSH_INTERVAL_SECONDS
    """Between two writes to storage."""
    compact_seconds: float = COMPACT_INTERVAL_SECONDS
    """Between two looks whether there is enough to compact."""


class RunMemory:
    """What is known of one run while it is live.

    Owns: `RunFigures`, what the heartbeat and the metrics say; `RunRecord`, what is to be written; never weights.
    Concurrency: methods may run in parallel; a lock guards the state, and storage is written outside of it.
    Failure: dies with its process; a new one continues from the run directory.
    Blocking: `flush` and `compact` wait for storage; nothing else does.
    """

    def __init__(self, config: MonitorConfig, clock: Clock) -> None:
        """Open the run directory and start serving metrics."""
        self._config, self._clock = config, clock
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        before = config.run.read_heartbeat()
        events = config.run.read_events()
        self._record = RunRecord(config.run, events)
        self._saves = CheckpointClock(config.checkpoint_interval, events)
        self._instructions = Instructions()
        self._failures = Failures(config.max_restarts_without_progress)
        self._watch = HangWatch(config.hang_seconds)
        self._stragglers = StragglerWatch(config.straggler_factor)
        self._left_out_nodes: set[str] = set()
        """Ids of those that failed a check, or make others wait. Known until the driver ends."""
        self._profile: ProfileRequest | None = None
        """The one that is asked for, or under way."""
        self._profile_is_taken = False
        self._settings = ChangedSettings()
        self._recovery: Recovery | None = None
        self._held: HeldCheckpoint | None = None
        """Where the newest memory checkpoint is. Nobody else knows, as what holders have ends with the driver."""
        self._furthest_held = 0
        self._first_attempt_here = self._record.attempt + 1
        self._driver_died = before.get("state") == "running"  # and nobody ended it
        self._left_out = config.run.read_left_out()
        self._probed = [event for event in events if event["kind"] == PROBE_EVENT]
        every_steps = None if self._saves.seconds is not None else config.checkpoint_interval.every_steps
        fixed = {
            "run": config.run.name,
            "state": "starting",
            "waiting": False,
            "total_steps": config.schedule.total_steps,
            "target_world_size": config.target_world_size,
            "checkpoint_every_steps": every_steps,
            "checkpoint_interval_seconds": self._saves.seconds,
            "device": config.device,
            "steps_per_epoch": config.schedule.steps_per_epoch,
            "quarantined": self._record.quarantined,
        }
        pages = run_pages(config.run, config.host, self._live_figures)
        patience_seconds = config.run.storage.retry_seconds
        exporter = RunExporter(config.run.name, config.host, config.metrics_port, patience_seconds, pages)
        self._figures = RunFigures(
            fixed,
            before,
            exporter,
            global_batch_size=config.global_batch_size,
            wall=clock.wall,
            monotonic=clock.monotonic,
        )
        self._figures.probed(ProbeCurve.of(self._probed))
        self._speed = SpeedWatch(config.global_batch_size)
        self._trackers = Trackers(config.trackers, config.run, config.global_batch_size, events, self._report)
        self._notifier: Notifier | None = None
        if config.webhook:
            self._notifier = Notifier(config.webhook, config.run, events, self._report, config.patience)

    def status(self) -> dict[str, Any]:
        """What the heartbeat says, fresh."""
        with self._lock:
            return self._figures.heartbeat()

    def _live_figures(self) -> LiveFigures:
        """For the page, which is drawn elsewhere."""
        with self._lock:
            return LiveFigures(self._figures.heartbeat(), self._figures.ranks())

    def flush(self) -> None:
        """Write history, events and heartbeat; returns when storage has them."""
        with self._flushing:
            with self._lock:  # at once: a heartbeat that is seen is of what is written
                tail, heartbeat = self._record.tail(), self._figures.heartbeat()
            try:
                tail.write(self._config.run)
                self._config.run.write_heartbeat(heartbeat)
            except BaseException:
                with self._lock:
                    self._record.touch()
                raise
            with self._lock:
                self._record.written(tail)
                self._figures.saved(heartbeat)

    def settled(self) -> tuple[int, int]:
        """What nobody writes any more: the arguments of `compact`. Waits for a flush in progress."""
        with self._flushing, self._lock:  # a flush may be writing parts of the attempt before
            return self._record.settled()

    def compact(self, attempt: int, first_step: int) -> None:
        """Compact all that is settled. Delays no step and no flush; may be killed anywhere (jobs.run.parts).

        Args:
            attempt: As of `RunDirectory.compact`.
            first_step: As of `RunDirectory.compact`.

        Raises:
            UserError: A part is damaged, or storage refuses.
            OSError: Storage cannot be reached.
        """
        while self._config.run.compact(attempt, first_step, self._is_driver):  # more than once after an older release
            pass

    def _is_driver(self) -> bool:
        """Whether no other driver has taken over the run: one that has been cut off must not judge what is settled."""
        ruler = current_lease(self._config.run.storage, self._config.run.path(CLAIMS))
        return ruler is None or ruler.number <= self._config.claim

    def _end_holders(self, nodes: Sequence[str]) -> None:
        """End the holders of nodes that the run has left."""
        end_holders(self._config.run.url, nodes)

    def _add_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = self._record.add_event(kind, fields)
        self._saves.see(event)
        self._trackers.see_event(event)
        if self._notifier:
            self._notifier.see_event(event)
        return event

    def _report(self, kind: str, reason: str) -> None:
        """Note what a tracker or the notifier says, from its own thread."""
        with self._lock:
            self._add_event(kind, step=self._figures["step"], reason=reason)

    def _add_row(self, row: dict[str, Any], gradient_norm: float | None = None) -> None:
        self._record.add_row(row)
        self._trackers.see_row(row, gradient_norm)
        if "skipped" in row:
            self._figures.count("skipped_steps")

    def _decide_interval(self) -> None:
        decision = self._saves.decide(
            failures=self._figures.failures,
            worker_seconds=self._figures.totals["worker_seconds_total"],
            world_size=int(self._figures["world_size"] or self._config.target_world_size),
        )
        if decision:
            seconds = round(decision.seconds, 3)
            self._add_event("checkpoint-interval", step=self._figures["step"], seconds=seconds, reason=decision.reason)
            self._figures.update(checkpoint_interval_seconds=self._saves.seconds)
