"""The reports of ranks to the run's monitor: attempts, steps, samples and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.checkpoint.held.held_checkpoint import HeldCheckpoint, nodes_of
from jobs.checkpoint.restore import Source
from jobs.metrics.rank_figures import FigureTable, RankFigures
from jobs.metrics.recovery import Recovery
from jobs.metrics.utilization import GroupCompute
from jobs.monitor.health_reports import HealthReports
from jobs.monitor.profile_reports import ProfileReports
from jobs.rank.watchdog import Pulse
from jobs.step.instruction import Instruction


class RankReports(HealthReports, ProfileReports):
    """The part of the monitor that ranks call. Concurrency and failure: as `RunMemory`.

    Blocking: `begin_attempt`, `roll_back` and `checkpoint_damaged` wait for storage; `record` is O(1).
    """

    def begin_attempt(
        self,
        *,
        world_size: int,
        resume_step: int,
        source: Source | None,
        counters: dict[str, float],
        host: str,
        started_at_seconds: float,
        compute: GroupCompute,
    ) -> int:
        """Number a new attempt. Rank 0 calls it before it restores anything.

        Args:
            world_size: Ranks that are about to train.
            resume_step: Steps that the checkpoint to restore holds; 0 for none.
            source: Where that is; None where there is none.
            counters: Run-level counters of that checkpoint.
            host: Where rank 0 runs.
            started_at_seconds: Unix time at which it began.
            compute: What the group computes in a step, and could compute.
        """
        self.flush()
        with self._lock:
            self._record.begin_attempt()
            number = self._record.attempt
            if number == self._first_attempt_here:
                # The last heartbeat is newer than the commit, unless it was lost.
                self._figures.catch_up(counters)
            before = self._figures["world_size"]
            settings = self._settings.begin_attempt()
            kind, reason = self._start_kind(before, world_size, settings)
            self._count_start(kind, started_at_seconds)
            self._end_spells(resume_step)
            self._drop_profile()
            self._watch.begin(number)
            self._instructions.begin_attempt()
            self._failures.begin_attempt()
            self._speed.begin_attempt()
            steps_redone = self._figures.group_began(
                attempt=number,
                world_size=world_size,
                resume_step=resume_step,
                compute=compute,
                from_memory=source == "memory",
            )
            if self._held and self._held.commit.step > resume_step:
                self._held = None  # it could not be read, or its steps were rolled back
            self._add_event(
                kind,
                reason=reason,
                step=resume_step,
                world_size=world_size,
                world_size_before=before,
                steps_redone=steps_redone,
                restored_from=source or "",
                host=host,
                **compute.to_json(),
            )
            self._decide_interval()
        self.flush()
        return number

    def restored(self) -> None:
        """Note that the attempt's engine holds the checkpoint."""
        with self._lock:
            if self._recovery:
                self._recovery.restored_at = self._clock.wall()

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
            self._add_row(row, gradient_norm)
            self._report_recovery(int(row["step"]))
            flops = self._figures.step_flops(int(row["step"]))
            if why_slow := self._speed.step_done(row["step_seconds"], row["world_size"], flops):
                self._add_event("slow", step=row["step"], reason=why_slow)
            if "skipped" in row:
                self._add_event("skipped", step=row["step"], reason=f"{row['skipped']} is not finite")
            now = self._clock.monotonic()
            self._figures.step_done(row, gradient_norm, reading, ranks, now)
            self._look_for_stragglers(int(row["step"]), ranks)
            return self._instructions.after_step(now, save_is_due=self._saves.is_due(now))

    def skip(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note the history rows of steps that are skipped: not trained, but done."""
        with self._lock:
            for row in rows:
                self._add_row(row)
            self._figures.update(step=rows[-1]["step"])

    def roll_back(self, *, first_step: int, last_step: int, reason: str) -> None:
        """Note, for all later attempts, that steps are skipped; returns when storage has it.

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
            if self._held and self._held.commit.step >= first_step:
                self._held = None
        self._config.run.write_left_out(windows)
        self.flush()

    def quarantine(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note samples that were found unusable; each is kept once in the run's life.

        Args:
            rows: As `Substitution.to_json` gives them, and the step.
        """
        with self._lock:
            self._record.quarantine(rows)
            self._figures.update(quarantined=self._record.quarantined)

    def paused(self) -> None:
        """Note that the ranks have saved, and stand still; if nobody ends them, they continue."""
        with self._lock:
            self._instructions.paused()

    def save_began(self, step: int) -> dict[str, float]:
        """Note that the ranks save after `step`.

        Returns:
            What the commit keeps so that counters continue after a restart.
        """
        with self._lock:
            self._instructions.saved()
            self._saves.save_began(step, self._clock.monotonic())
        return self.counters()

    def checkpoint_committed(
        self, *, step: int, stall_seconds: float, duration_seconds: float, size_bytes: int, milestone: bool
    ) -> None:
        """Note a committed checkpoint.

        Args:
            step: Its steps.
            stall_seconds: How long training stood still for it.
            duration_seconds: From there until it was committed.
            size_bytes: Of its files.
            milestone: Whether it is kept permanently.
        """
        with self._lock:
            self._figures.update(
                checkpoint_step=step,
                checkpoint_at_seconds=self._clock.wall(),
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

    def counters(self) -> dict[str, float]:
        """What a commit keeps so that counters continue after a restart."""
        with self._lock:
            return {**self._figures.totals, "restarts": self._figures["restarts"]}

    def memory_held(self, held: HeldCheckpoint, *, stall_seconds: float) -> None:
        """Note a memory checkpoint that is whole: a restart reads it from now on.

        Args:
            held: Where it is.
            stall_seconds: How long training stood still for it.
        """
        with self._lock:
            left = nodes_of(self._held) - nodes_of(held)
            is_further = self._held is None or held.commit.step > self._held.commit.step
            self._held = held
            if is_further and held.commit.step > self._furthest_held:
                self._furthest_held = held.commit.step
                self._failures.progressed()
            self._figures.count("memory_checkpoints")
            self._figures.update(
                memory_checkpoint_step=held.commit.step,
                memory_checkpoint_at_seconds=self._clock.wall(),
                memory_checkpoint_bytes=held.commit.bytes,
                memory_checkpoint_stall_seconds=stall_seconds,
            )
        self._end_holders(sorted(left))

    def memory_not_held(self, *, step: int, error: str, is_off: bool) -> None:
        """Note a memory checkpoint that failed; training continues.

        Args:
            step: Its steps.
            error: Why.
            is_off: Whether no other is tried in this attempt.
        """
        with self._lock:
            self._figures.count("memory_checkpoint_failures")
            reason = f"{error}; no others are made in this attempt" if is_off else error
            self._add_event("memory-checkpoint-failed", step=step, reason=reason)

    def memory_checkpoint(self) -> HeldCheckpoint | None:
        """The newest one that is whole, as far as is known: its nodes may be gone."""
        with self._lock:
            return self._held

    def memory_lost(self, *, step: int, reason: str) -> None:
        """Note that a memory checkpoint could not be read, so that the store is."""
        with self._lock:
            self._held = None
            self._add_event("memory-checkpoint-lost", step=step, reason=reason)

    def checkpoint_failed(self, *, step: int, error: str) -> None:
        """Note a checkpoint that could not be uploaded or committed; training continues."""
        with self._lock:
            self._figures.count("checkpoint_failures")
            self._add_event("checkpoint-failed", step=step, reason=error)

    def checkpoint_damaged(self, *, step: int, reason: str) -> None:
        """Note a checkpoint that is skipped since it is not as it was written."""
        with self._lock:
            self._add_event("checkpoint-damaged", step=step, reason=reason)
        self.flush()

    def pulse(self, pulse: Pulse) -> None:
        """Note how far a rank is (jobs.rank.watchdog)."""
        with self._lock:
            self._watch.hear(pulse, self._clock.monotonic())

    def _start_kind(self, before: int | None, now: int, settings: str) -> tuple[str, str]:
        if self._record.attempt == 1:
            return "start", "new run"
        if self._record.attempt == self._first_attempt_here:
            return "restart", "resumed by a new driver"
        if self._failures.reason:
            return "restart", self._failures.reason
        resized = f"workers {before} -> {now}"
        return "resize", f"{settings} (set; {resized})" if settings else resized

    def _count_start(self, kind: str, started_at_seconds: float) -> None:
        """Count what led to an attempt, and note when its recovery began."""
        if self._driver_died and not self._failures.reason:
            self._figures.count("failures", label="DriverDied")
        self._driver_died = False
        if kind == "start":
            self._recovery = None
            return
        last_step_at, failed_at = self._figures["last_step_at_seconds"], self._failures.failed_at
        self._recovery = Recovery(last_step_at, failed_at, started_at_seconds, self._clock.wall())
        self._figures.restarted(kind)

    def _report_recovery(self, step: int) -> None:
        """After the first step of an attempt: how long the run stood still, and what for."""
        if self._recovery:
            spent, self._recovery = self._recovery.seconds(self._clock.wall()), None
            self._figures.recovered(spent)
            self._add_event("recovered", step=step, **{f"{phase}_seconds": value for phase, value in spent.items()})
