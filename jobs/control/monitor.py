"""The run's memory while it is live: history, events, heartbeat and metrics, in one actor beside the driver.

Workers come and go; this stays. Rank 0 tells it of every step without waiting; a thread of its own writes to storage,
so an object store that is away delays no step until the next checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.control.checkpoint_clock import CheckpointClock
from jobs.control.failure_cause import Remedy
from jobs.control.failures import Failures
from jobs.metrics.exporter import RunExporter
from jobs.metrics.rank_figures import FigureTable, RankFigures
from jobs.metrics.recovery import Recovery
from jobs.metrics.run_figures import RunFigures
from jobs.rank.instruction import Instruction, Instructions
from jobs.rank.watchdog import Examined, Hang, HangWatch, Pulse, examined_on_its_node, hang_text, training_stack
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.recipe.schedule import Schedule
from jobs.run.directory import RunDirectory
from jobs.run.record import RunRecord

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_SECONDS = 2.0
"""Between heartbeats; each is one PUT."""
UNKNOWN_DEADLINE_SECONDS = 120.0
"""Until a node that is drained is gone, where its cloud does not say; Ray Train then ends the group after as long."""
LEAST_SAVE_SECONDS = 5.0
"""Left for the last save before a node goes."""
WATCH_INTERVAL_SECONDS = 1.0
HOSTS_NAMED = 4
"""In a line; a rack may have many."""


@dataclass(frozen=True)
class MonitorConfig:
    """What a monitor needs to know of its run."""

    run: RunDirectory
    schedule: Schedule
    global_batch_size: int
    max_restarts_without_progress: int
    target_world_size: int
    """Ranks that the run takes where they are to be had."""
    checkpoint_interval: IntervalRule
    device: str
    """`cuda` or `cpu`: what a rank-hour is an hour of."""
    hang_seconds: float
    host: str
    metrics_port: int
    targets_folder: str
    """Folder that the local Prometheus watches; empty: none."""


class RunMonitor:
    """Record of one run. A plain class: jobs.control.driver makes an actor of it; tests call it directly.

    Owns: `RunFigures`, what the heartbeat and the metrics say; `RunRecord`, what is to be written; never weights.
    Concurrency: methods may run in parallel; a lock guards the state, and storage is written outside of it.
    Failure: dies with its process; a new one continues from the run directory. What was unwritten is of steps after
        the last commit (`flush` precedes every commit): rank 0 sees the death and fails, and they are done again.
    Blocking: `record` is O(1); `flush` waits for storage.
    """

    def __init__(self, config: MonitorConfig) -> None:
        """Open the run directory and start serving metrics."""
        self._config = config
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        before = config.run.read_heartbeat()
        events = config.run.read_events()
        self._record = RunRecord(config.run, events)
        self._clock = CheckpointClock(config.checkpoint_interval, events)
        self._instructions = Instructions()
        self._failures = Failures(config.max_restarts_without_progress)
        self._watch = HangWatch(config.hang_seconds)
        self._recovery: Recovery | None = None
        self._outcome = ""
        self._first_attempt_here = self._record.attempt + 1
        self._driver_died = before.get("state") == "running"  # and nobody ended it
        self._left_out = config.run.read_left_out()
        fixed = {
            "run": config.run.name,
            "state": "starting",
            "waiting": False,
            "total_steps": config.schedule.total_steps,
            "target_world_size": config.target_world_size,
            "checkpoint_every_steps": None
            if self._clock.seconds is not None
            else config.checkpoint_interval.every_steps,
            "checkpoint_interval_seconds": self._clock.seconds,
            "device": config.device,
            "steps_per_epoch": config.schedule.steps_per_epoch,
            "quarantined": self._record.quarantined,
        }
        patience_seconds = config.run.storage.retry_seconds
        exporter = RunExporter(config.run.name, config.host, config.metrics_port, patience_seconds)
        self._figures = RunFigures(fixed, before, exporter, global_batch_size=config.global_batch_size)
        if config.targets_folder:
            self._figures.announce(Path(config.targets_folder))
        threading.Thread(target=self._flush_forever, name="monitor-flush", daemon=True).start()
        threading.Thread(target=self._watch_forever, name="monitor-watch", daemon=True).start()

    def begin_attempt(
        self, *, world_size: int, resume_step: int, counters: dict[str, float], host: str, started_at_seconds: float
    ) -> int:
        """Number a new life of the worker group. Rank 0 calls it before it restores anything.

        Args:
            world_size: Ranks that are about to train.
            resume_step: Steps that the checkpoint to restore holds; 0 for none.
            counters: Run-level counters of that checkpoint.
            host: Where rank 0 runs.
            started_at_seconds: Unix time at which it began.
        """
        self.flush()
        with self._lock:
            self._record.begin_attempt()
            number = self._record.attempt
            if number == self._first_attempt_here:
                # The last heartbeat is newer than the commit, unless it was lost.
                self._figures.catch_up(counters)
            before = self._figures["world_size"]
            kind, reason = self._start_kind(before, world_size)
            if self._driver_died and not self._failures.reason:
                self._figures.count("failures", label="DriverDied")
            self._driver_died = False
            self._watch.begin(number)
            last_step_at, failed_at = self._figures["last_step_at_seconds"], self._failures.failed_at
            self._recovery = Recovery(last_step_at, failed_at, started_at_seconds, time.time())
            self._instructions.begin_attempt()
            self._failures.begin_attempt()
            if kind == "start":
                self._recovery = None
            else:
                self._figures.restarted(kind)
            steps_redone = self._figures.group_began(attempt=number, world_size=world_size, resume_step=resume_step)
            self._add_event(
                kind,
                reason=reason,
                step=resume_step,
                world_size=world_size,
                world_size_before=before,
                steps_redone=steps_redone,
                host=host,
            )
            self._decide_interval()
        self.flush()
        return number

    def _start_kind(self, before: int | None, now: int) -> tuple[str, str]:
        if self._record.attempt == 1:
            return "start", "new run"
        if self._record.attempt == self._first_attempt_here:
            return "restart", "resumed by a new driver"
        if self._failures.reason:
            return "restart", self._failures.reason
        return "resize", f"workers {before} -> {now}"

    def restored(self) -> None:
        """Note that the attempt's engine holds the checkpoint."""
        with self._lock:
            if self._recovery:
                self._recovery.restored_at = time.time()

    def _tell_recovery(self, step: int) -> None:
        """After the first step of an attempt: how long the run stood still, and what for."""
        if self._recovery:
            spent, self._recovery = self._recovery.seconds(time.time()), None
            self._figures.recovered(spent)
            self._add_event("recovered", step=step, **{f"{phase}_seconds": value for phase, value in spent.items()})

    def record(
        self,
        row: dict[str, Any],
        gradient_norm: float,
        reading: Mapping[str, float],
        ranks: FigureTable | Sequence[RankFigures],
    ) -> Instruction:
        """Note one finished step; returns what the ranks should do.

        Args:
            row: The history row (docs/data-format.md).
            gradient_norm: Before clipping; a diagnostic that is not kept in the history.
            reading: The fields of `StepReading`: what all ranks read for the step.
            ranks: How each rank fared.
        """
        with self._lock:
            self._instructions.trains()
            self._add_row(row)
            self._tell_recovery(int(row["step"]))
            if "skipped" in row:
                self._add_event("skipped", step=row["step"], reason=f"{row['skipped']} is not finite")
            now = time.monotonic()
            self._figures.step_done(row, gradient_norm, reading, ranks, now)
            return self._instructions.after_step(now, save_is_due=self._clock.is_due(now))

    def pause(self) -> bool:
        """Have the ranks save and stand still, because their group is about to end; asked again until they do.

        Returns:
            Whether they do by now.
        """
        with self._lock:
            if self._figures["state"] == "running":
                self._instructions.pause()
            return self._instructions.stands_still

    def end_pause(self) -> None:
        """Let the ranks train on, since they took too long."""
        with self._lock:
            self._instructions.withdraw()

    def paused(self) -> None:
        """Note that the ranks have saved, and stand still; if nobody ends them, they go on."""
        with self._lock:
            self._instructions.paused()

    def drain(self, ranks: Sequence[int], seconds: float | None) -> None:
        """Note that nodes are being drained; have the ranks save now, and once more before those go.

        Args:
            ranks: On those nodes.
            seconds: Until they are gone; None where nobody knows.
        """
        with self._lock:
            when = "soon" if seconds is None else f"in {max(0.0, seconds):.0f} s"
            self._add_event("drain", step=self._figures["step"], reason=f"the node of {_named(ranks)} goes away {when}")
            self._instructions.save()
            left = UNKNOWN_DEADLINE_SECONDS if seconds is None else seconds
            last_save = max(LEAST_SAVE_SECONDS, 2 * float(self._figures["checkpoint_seconds"] or 0.0))
            self._instructions.pause_at(time.monotonic() + left - last_save)

    def waiting(self, possible: int, needed: int) -> None:
        """Note that the cluster has no room for the fewest workers that the run trains with.

        Args:
            possible: Workers that it has room for.
            needed: min_workers.
        """
        with self._lock:
            self._figures.update(waiting=True)
            if not self._instructions.stop_reason:
                self._figures.update(state="waiting")
            reason = f"there is room for {possible} workers, and min_workers is {needed}; waits for nodes"
            self._add_event("waiting", step=self._figures["step"], reason=reason)

    def group_ended(self) -> None:
        """Note that Ray Train gave the worker group up, for whatever reason."""
        with self._lock:
            if self._figures["state"] == "running":
                self._figures.update(state="restarting")

    def _add_row(self, row: dict[str, Any]) -> None:
        self._record.add_row(row)
        if "skipped" in row:
            self._figures.count("skipped_steps")

    def roll_back(self, *, first_step: int, last_step: int, reason: str) -> None:
        """Note, for all attempts to come, that steps are left out; returns when storage has it.

        Args:
            first_step: The first of them, from 1.
            last_step: The one whose loss or gradient was not finite.
            reason: For people.
        """
        with self._lock:
            window = {
                "first_step": first_step,
                "last_step": last_step,
                "attempt": self._record.attempt,
                "reason": reason,
            }
            self._left_out.append(window)
            self._figures.count("rollbacks")
            self._add_event("rollback", step=last_step, first_step=first_step, reason=reason)
            windows = list(self._left_out)
        self._config.run.write_left_out(windows)
        self.flush()

    def leave_out(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note the history rows of steps that are passed over without being trained."""
        with self._lock:
            for row in rows:
                self._add_row(row)
            self._figures.update(step=rows[-1]["step"])

    def quarantine(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note samples that were found unusable; each is kept once in the run's life.

        Args:
            rows: As `Substitution.to_json` gives them, and the step.
        """
        with self._lock:
            self._record.quarantine(rows)
            self._figures.update(quarantined=self._record.quarantined)

    def checkpoint_committed(
        self, *, step: int, stall_seconds: float, duration_seconds: float, size_bytes: int, milestone: bool
    ) -> None:
        """Note a committed checkpoint.

        Args:
            step: Its steps.
            stall_seconds: How long training stood still for it.
            duration_seconds: From there until it was committed.
            size_bytes: Of its files.
            milestone: Whether it is kept for ever.
        """
        with self._lock:
            self._figures.update(
                checkpoint_step=step,
                checkpoint_at_seconds=time.time(),
                checkpoint_bytes=size_bytes,
                checkpoint_seconds=duration_seconds,
                checkpoint_stall_seconds=stall_seconds,
            )
            self._figures.count("checkpoints")
            self._figures.count("checkpoint_stall_seconds", stall_seconds)
            self._failures.progressed()
            self._add_event(
                "checkpoint",
                step=step,
                stall_seconds=round(stall_seconds, 3),
                duration_seconds=round(duration_seconds, 3),
                bytes=size_bytes,
                milestone=milestone,
            )
            self._decide_interval()

    def _decide_interval(self) -> None:
        decision = self._clock.decide(
            failures=self._figures.failures,
            worker_seconds=self._figures.totals["worker_seconds_total"],
            world_size=int(self._figures["world_size"] or self._config.target_world_size),
        )
        if decision:
            seconds = round(decision.seconds, 3)
            self._add_event("checkpoint-interval", step=self._figures["step"], seconds=seconds, reason=decision.reason)
            self._figures.update(checkpoint_interval_seconds=self._clock.seconds)

    def checkpoint_failed(self, *, step: int, error: str) -> None:
        """Note a checkpoint that could not be uploaded or committed; training goes on."""
        with self._lock:
            self._figures.count("checkpoint_failures")
            self._add_event("checkpoint-failed", step=step, reason=error)

    def checkpoint_damaged(self, *, step: int, reason: str) -> None:
        """Note a checkpoint that is passed over since it is not as it was written."""
        with self._lock:
            self._add_event("checkpoint-damaged", step=step, reason=reason)
        self.flush()

    def consolidated(self, *, step: int, url: str, size_bytes: int, seconds: float) -> None:
        """Note that the weights of a step were written."""
        with self._lock:
            self._add_event("consolidated", step=step, url=url, bytes=size_bytes, duration_seconds=round(seconds, 3))

    def consolidation_failed(self, *, step: int, error: str) -> None:
        """Note a step whose weights could not be written; training goes on."""
        with self._lock:
            self._figures.count("consolidation_failures")
            self._add_event("consolidation-failed", step=step, reason=error)

    def save_began(self, step: int) -> dict[str, float]:
        """Note that the ranks save after `step`.

        Returns:
            What the commit keeps so that counters go on after a restart.
        """
        with self._lock:
            self._instructions.saved()
            self._clock.save_began(step, time.monotonic())
            return {**self._figures.totals, "restarts": self._figures["restarts"]}

    def worker_failed(self, error: str, remedy: Remedy) -> str:
        """Note why the worker group is about to end; the next attempt's event quotes it.

        Args:
            error: The root cause in one line.
            remedy: What may fix it.

        Returns:
            Why the run should be given up; empty to restart it.
        """
        with self._lock:
            self._watch.end()
            self._instructions.trains()
            self._figures.count("failures", label=self._failures.add(error, time.time()))
            self._figures.group_failed()
            self._record.touch()
            has_trained = self._figures["last_step_at_seconds"] is not None
            return self._failures.verdict(remedy, has_trained=has_trained)

    def pulse(self, pulse: Pulse) -> None:
        """Note how far a rank is (jobs.rank.watchdog)."""
        with self._lock:
            self._watch.hear(pulse, time.monotonic())

    def look_for_hangs(self, now: float, examine: Callable[[Pulse], Examined]) -> None:
        """Examine and kill the ranks that stand still, if there are any, and tell of each in an event.

        Args:
            now: Monotonic seconds.
            examine: Finds out about a rank's process and kills it.
        """
        with self._lock:
            hangs = self._watch.hangs(now)
            if hangs:
                self._watch.end()
        for hang in hangs:
            self._tell_hang(hang, examine)

    def _tell_hang(self, hang: Hang, examine: Callable[[Pulse], Examined]) -> None:
        with self._lock:
            # Before it is killed: the controller asks why as soon as it has seen the death.
            if not self._failures.cause:
                self._failures.know_cause("Hang", hang_text(hang, Examined("being looked at", "")))
        found = examine(hang.pulse)
        text = hang_text(hang, found)
        logger.error("%s\n%s", text, found.stacks)
        with self._lock:
            self._failures.know_cause("Hang", text)
            self._figures.count("hangs")
            self._add_event(
                "hang",
                step=self._figures["step"],
                rank=hang.pulse.rank,
                host=hang.pulse.host,
                pid=hang.pulse.process.pid,
                phase=hang.pulse.phase,
                seconds=round(hang.seconds, 1),
                state=found.state,
                stack=training_stack(found.stacks),
                reason=text,
            )

    def unreachable(self, hosts: Mapping[str, str], seconds: float) -> None:
        """Note that nodes with ranks have fallen silent, and that their group is being ended for it.

        Args:
            hosts: Name and address of each, by Ray's node id.
            seconds: For how long.
        """
        with self._lock:
            ranks = sorted(rank for node_id in hosts for rank in self._watch.ranks_on(node_id))
            self._watch.end()  # all the others stand still now
            one = len(hosts) == 1
            node, has = ("node", "has") if one else ("nodes", "have")
            whose = (
                f"the {node} of {_named(ranks)}" if ranks else f"{'a ' if one else ''}{node} where ranks were to start"
            )
            text = f"{whose} ({_listed(list(hosts.values()))}) {has} been unreachable for {seconds:.0f} s"
            self._failures.know_cause("NodeUnreachable", text)
            self._add_event("unreachable", step=self._figures["step"], reason=text)

    def _watch_forever(self) -> None:
        while not self._outcome:
            time.sleep(WATCH_INTERVAL_SECONDS)
            self.look_for_hangs(time.monotonic(), examined_on_its_node)

    def request_stop(self, reason: str) -> None:
        """Ask the run to save a checkpoint and end after the current step."""
        with self._lock:
            self._instructions.stop(reason)
            self._figures.stop_asked()
            self._record.touch()

    def end(self, outcome: str, reason: str = "") -> None:
        """Note that the run is `finished`, `stopped` or `failed`, and write everything."""
        with self._lock:
            self._outcome = outcome
            self._watch.end()
            self._figures.ended(outcome)
            self._add_event(outcome, step=self._figures["step"], reason=reason or self._instructions.stop_reason)
        self.flush()
        if outcome != "failed" and self._config.targets_folder:
            self._figures.withdraw(Path(self._config.targets_folder))

    def status(self) -> dict[str, Any]:
        """What the heartbeat says, fresh."""
        with self._lock:
            return self._figures.heartbeat()

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

    def _add_event(self, kind: str, **fields: Any) -> None:
        self._clock.see(self._record.add_event(kind, fields))

    def _flush_forever(self) -> None:
        while not self._outcome:
            time.sleep(FLUSH_INTERVAL_SECONDS)
            try:
                self.flush()
                if self._config.run.take_stop_request():
                    self.request_stop("asked by `convmae stop`")
            except Exception:
                logger.warning("history, events and heartbeat could not be written; trying again", exc_info=True)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _listed(hosts: Sequence[str]) -> str:
    more = f" and {len(hosts) - HOSTS_NAMED} more" if len(hosts) > HOSTS_NAMED else ""
    return "; ".join(hosts[:HOSTS_NAMED]) + more
