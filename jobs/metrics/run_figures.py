"""Figures of a live run, for its heartbeat and for Prometheus, with counters that outlive drivers."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.metrics.exporter import COUNTERS, RunExporter, name_and_label, saved_counters
from jobs.metrics.rank_figures import FigureTable, RankFigures
from jobs.metrics.utilization import GroupCompute
from jobs.run.probe_rows import ProbeCurve
from jobs.run.validation_rows import MAIN_VALIDATION, ValidationCurve

RATE_WINDOW_STEPS = 20
_KEPT = (
    "step",
    "world_size",
    "last_step_at_seconds",
    "validation_top1",
    "validation_top5",
    "validation_plan",
    "validation_low",
    "validation_high",
    "validation_best_low",
    "checkpoint_step",
    "checkpoint_at_seconds",
    "checkpoint_bytes",
    "checkpoint_seconds",
    "checkpoint_stall_seconds",
    "probe_seconds",
)
"""What a new driver keeps from the last heartbeat of the previous one."""


class RunFigures:
    """The figures of one run, which are served while this process lives.

    Concurrency: none of its own; the monitor calls it under its lock. Blocking: every method is O(1),
    except `announce` and `withdraw`, which write a small file.
    """

    def __init__(
        self,
        fixed: Mapping[str, Any],
        before: Mapping[str, Any],
        exporter: RunExporter,
        *,
        global_batch_size: int,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Continue from the last heartbeat.

        Args:
            fixed: Values known from the start, among them the number of steps (`total_steps`).
            before: The last heartbeat; empty for a new run.
            exporter: Serves those that are metrics.
            global_batch_size: Images in a step.
            wall: Unix seconds.
            monotonic: Seconds that never go back.
        """
        self._exporter = exporter
        self._global_batch_size = global_batch_size
        self._wall, self._monotonic = wall, monotonic
        self._step_times: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW_STEPS)
        self._workers_seen_at = monotonic()
        self._stop_asked = False
        self._compute: GroupCompute | None = None
        self._step_flops = 0.0
        """Of the last step."""
        self._totals = saved_counters(before)
        self._served: dict[str, float] = {}
        self.saved(before)
        self._status: dict[str, Any] = {
            "step": 0,
            "world_size": None,
            "last_step_at_seconds": None,
            "checkpoint_seconds": None,
            "ending": 0,
            "restarts": int(before.get("restarts", 0)),
            **{key: before[key] for key in _KEPT if key in before},
            **fixed,
            "metrics_url": exporter.url,
            "page_url": exporter.page_url,
        }
        exporter.update({**self._status, "world_size": 0})  # no rank trains yet

    def __getitem__(self, key: str) -> Any:
        return self._status[key]

    @property
    def totals(self) -> dict[str, float]:
        """All counters; a commit keeps them."""
        return dict(self._totals)

    @property
    def failures(self) -> int:
        """Failures of the worker group over the whole run."""
        return int(sum(total for key, total in self._totals.items() if key.startswith("failures_total:")))

    def step_flops(self, step: int) -> float:
        """Operations of the model for a step, from 1; 0 before the first group began."""
        return self._compute.flops_of_step(step) if self._compute else 0.0

    def heartbeat(self) -> dict[str, Any]:
        """All figures, as the heartbeat has them."""
        return {**self._status, **self._totals, "updated_at_seconds": self._wall()}

    def ranks(self) -> FigureTable:
        """The figures that are served of the ranks that train now."""
        return self._exporter.ranks()

    def update(self, **changes: Any) -> None:
        """Take new values; None: unknown now."""
        self._status.update(changes)
        self._exporter.update(changes)

    def stop_asked(self) -> None:
        """Note that the run was asked to save and end."""
        self._stop_asked = True
        self.update(state="stopping", ending=1)

    def count(self, name: str, amount: float = 1, label: str = "") -> None:
        """Add to one of `exporter.COUNTERS`, or of `LABELLED_COUNTERS` with the value of its label."""
        key = f"{name}_total:{label}" if label else f"{name}_total"
        self._totals[key] = self._totals.get(key, 0.0) + amount

    def saved(self, heartbeat: Mapping[str, Any]) -> None:
        """Serve the counters of a heartbeat that was written.

        Never more than that: a driver that is killed would have served what the next one does not know, and Prometheus
        takes a counter that decreases by one for a new one, so that `rate` adds all of it.
        """
        for key, total in saved_counters(heartbeat).items():
            name, amount, label = name_and_label(key, total - self._served.get(key, 0.0))
            if amount > 0:
                self._exporter.count(name, amount, label)
                self._served[key] = total

    def catch_up(self, saved: Mapping[str, Any]) -> None:
        """Continue from the counters of a commit if they are ahead, since the last heartbeat was lost."""
        self._status["restarts"] = max(self._status["restarts"], int(saved.get("restarts", 0)))
        for key, total in saved_counters(saved).items():
            name, amount, label = name_and_label(key, max(0.0, total - self._totals.get(key, 0.0)))
            self.count(name, amount, label)

    def group_began(
        self, *, attempt: int, world_size: int, resume_step: int, compute: GroupCompute, from_memory: bool = False
    ) -> int:
        """Note that ranks resume from a checkpoint of `resume_step` steps; returns how many will be redone."""
        self._compute = compute
        steps_redone = max(0, int(self._status["step"]) - resume_step)
        self.count("steps_redone", steps_redone)
        self._workers_seen_at = self._monotonic()
        self._step_times.clear()
        self._exporter.update_ranks(())
        self.update(
            attempt=attempt,
            world_size=world_size,
            state="running",
            waiting=False,
            step=resume_step,
            **({} if from_memory else {"checkpoint_step": resume_step, "memory_checkpoint_step": None}),
            ending=int(self._stop_asked),
            restarts=self._status["restarts"],
            devices=compute.devices,
            images_per_second=None,
            device_flops_per_second=None,
            mfu_ratio=None,
            data_wait_ratio=None,
            eta_seconds=None,
        )
        return steps_redone

    def group_failed(self) -> None:
        """Note that no rank trains any more; their number is kept."""
        self._exporter.update({"world_size": 0})
        self._exporter.update_ranks(())
        self._status["state"] = "restarting"

    def step_done(
        self,
        row: Mapping[str, Any],
        gradient_norm: float,
        reading: Mapping[str, float],
        ranks: FigureTable | Sequence[RankFigures],
        now: float,
    ) -> None:
        """Take the figures of a finished step.

        Args:
            row: Its history row.
            gradient_norm: Before clipping; not shown if it is not finite.
            reading: The fields of `StepReading`: what all ranks read for the step.
            ranks: The metrics of each rank.
            now: Monotonic seconds.
        """
        step = int(row["step"])
        if self._step_flops != (flops := self.step_flops(step)):
            self._step_flops = flops
            self._step_times.clear()  # images have another size from here on
        self._step_times.append((now, float(row["data_wait_seconds"])))
        self.count("worker_seconds", int(row["world_size"]) * (now - self._workers_seen_at))
        self._workers_seen_at = now
        self.count("images", self._global_batch_size)
        for name in reading.keys() & COUNTERS.keys():
            self.count(name, reading[name])
        levels = {name: amount for name, amount in reading.items() if name not in COUNTERS}
        norm = {"gradient_norm": gradient_norm} if math.isfinite(gradient_norm) else {}
        is_ending = self._stop_asked or step >= self._status["total_steps"]
        changes = {**row, **levels, **norm, **self._rates(step), **self._validated(row)}
        self.update(**changes, ending=int(is_ending), last_step_at_seconds=self._wall())
        self._exporter.update_ranks(ranks)

    def _rates(self, step: int) -> dict[str, float]:
        if len(self._step_times) < 2:
            return {}
        seconds = self._step_times[-1][0] - self._step_times[0][0]
        step_seconds = seconds / (len(self._step_times) - 1)
        waited = sum(wait for _, wait in list(self._step_times)[1:])
        compute, world_size = self._compute, int(self._status["world_size"] or 0)
        total = int(self._status["total_steps"])
        left = compute.steps_like(step, total) if compute else total - step
        return {
            **(compute.figures(world_size, step_seconds, step) if compute else {}),
            "images_per_second": self._global_batch_size / step_seconds,
            "data_wait_ratio": min(1.0, waited / seconds),
            "eta_seconds": left * step_seconds,
        }

    def _validated(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Where a fine-tuning was measured: the accuracy's interval, and the lower end of that of the best so far."""
        newest = ValidationCurve.of([row]).newest
        if newest is None:
            return {}
        low, high = newest.interval(MAIN_VALIDATION)
        compares = self._status.get("validation_plan", "") == newest.plan
        best = max(low, self._status.get("validation_best_low", 0.0)) if compares else low
        return {"validation_low": low, "validation_high": high, "validation_best_low": best}

    def probed(self, curve: ProbeCurve) -> None:
        """Take the accuracies so far."""
        newest, control = curve.newest, curve.control
        self.update(
            probe_epoch=newest.epoch if newest else None,
            probe_accuracies=dict(newest.accuracies) if newest else {},
            probe_control=dict(control.accuracies) if control else {},
        )
        self._exporter.probed(curve)

    def restarted(self, kind: str) -> None:
        """Count a restart of the worker group: `restart` or `resize`."""
        self._status["restarts"] += 1
        self.count("restarts", 1, kind)

    def recovered(self, seconds: Mapping[str, float]) -> None:
        """Serve how long each phase of the last restart took."""
        self._exporter.recovered(seconds)

    def trained(self) -> None:
        """Note that no rank trains any more, since nothing is left to train."""
        self._exporter.update_ranks(())
        self._status["eta_seconds"] = 0.0

    def ended(self, outcome: str) -> None:
        """Note that the run is `finished`, `stopped` or `failed`."""
        self._exporter.update_ranks(())
        self.update(state=outcome, eta_seconds=0.0 if outcome == "finished" else None)

    def announce(self, folder: Path) -> None:
        """Let the Prometheus of the local stack, which watches `folder`, find the run."""
        self._exporter.announce(folder)

    def withdraw(self, folder: Path) -> None:
        """Undo `announce`."""
        self._exporter.withdraw(folder)
