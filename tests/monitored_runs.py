"""A run whose monitor a test calls as ranks, the controller and Prometheus would."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from jobs.checkpoint.restore import Source
from jobs.metrics.rank_figures import RankFigures
from jobs.metrics.utilization import GroupCompute
from jobs.monitor.monitor import RunMonitor
from jobs.monitor.run_memory import Clock, MonitorConfig
from jobs.notices.notifier import Patience
from jobs.notices.webhook import Webhook
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.schedule import Schedule
from jobs.run.directory import RunDirectory
from jobs.step.step_reading import StepReading
from jobs.trackers.trackers import TrackerSettings
from pipeline.store.storage import Storage

SCHEDULE = Schedule.of(named_recipe("tiny"), steps_per_epoch=100)
IMAGES = 64
EVERY_TEN = IntervalRule("steps", every_steps=10, every_seconds=60.0, min_seconds=20.0, max_seconds=600.0)
READING = StepReading(storage_requests=3, block_cache_hits=2, block_cache_bytes=7)._asdict()
RANKS = (RankFigures(step_seconds=0.5, data_wait_seconds=0.1), RankFigures(step_seconds=0.5, data_wait_seconds=0.2))

COMPUTE = GroupCompute(step_flops=4e12, peak_flops_per_second=20e12, devices="2 x A10 (data sheet)")

Start = Callable[..., RunMonitor]


class FlakyStorage(Storage):
    """A store whose writes fail as often as the test says."""

    failures_left = 0
    after_write: Callable[[str], None] | None = None
    """Called once, with the URL."""

    def write(self, url: str, data: bytes) -> None:
        if type(self).failures_left > 0:
            type(self).failures_left -= 1
            raise OSError(url)
        super().write(url, data)
        called, type(self).after_write = type(self).after_write, None
        if called:
            called(url)


class FakeClock:
    """A clock that stands still until the test moves it, or that moves a little whenever it is read."""

    seconds = 1000.0
    tick_seconds = 0.0

    def __call__(self) -> float:
        self.seconds += self.tick_seconds
        return self.seconds


def start_monitor(
    run: RunDirectory,
    max_restarts: int = 2,
    targets_folder: str = "",
    interval: IntervalRule = EVERY_TEN,
    flush_seconds: float = 3600.0,
    host: str = "127.0.0.1",
    leave_out_stragglers: bool = False,
    compact_seconds: float = 3600.0,
    claim: int = 1,
    wall: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    trackers: TrackerSettings | None = None,
    webhook: Webhook | None = None,
    patience: Patience = Patience(),  # noqa: B008  frozen
) -> RunMonitor:
    """A monitor that writes only when told to."""
    config = MonitorConfig(
        run=run,
        schedule=SCHEDULE,
        global_batch_size=IMAGES,
        max_restarts_without_progress=max_restarts,
        target_world_size=3,
        checkpoint_interval=interval,
        device="cpu",
        hang_seconds=30.0,
        straggler_factor=1.5,
        leave_out_stragglers=leave_out_stragglers,
        compact_seconds=compact_seconds,
        claim=claim,
        host=host,
        metrics_port=0,
        targets_folder=targets_folder,
        trackers=trackers or TrackerSettings(),
        webhook=webhook,
        patience=patience,
        flush_seconds=flush_seconds,
    )
    return RunMonitor(config, Clock(wall, monotonic))


def begin(
    monitor: RunMonitor,
    world_size: int = 2,
    resume_step: int = 0,
    started_at_seconds: float | None = None,
    compute: GroupCompute = COMPUTE,
    source: Source | None = None,
    **counters: float,
) -> int:
    return monitor.begin_attempt(
        world_size=world_size,
        resume_step=resume_step,
        source=source or ("store" if resume_step else None),
        counters=counters,
        host="here",
        started_at_seconds=time.time() if started_at_seconds is None else started_at_seconds,
        compute=compute,
    )


def record(monitor: RunMonitor, steps: range, attempt: int = 1, world_size: int = 2, step_seconds: float = 0.5) -> str:
    instruction = ""
    for step in steps:
        row = {
            "step": step,
            "epoch": (step - 1) // 100,
            "loss": 1 / step,
            "learning_rate": 1e-3,
            "world_size": world_size,
            "attempt": attempt,
            "step_seconds": step_seconds,
            "data_wait_seconds": 0.0,
        }
        instruction = monitor.record(row, gradient_norm=0.5, reading=READING, ranks=RANKS)
    return instruction


def commit(monitor: RunMonitor, step: int) -> None:
    monitor.checkpoint_committed(step=step, stall_seconds=0.25, duration_seconds=1.5, size_bytes=1000, milestone=False)


def steps_of(run: RunDirectory) -> list[int]:
    return [row["step"] for row in run.read_history()]


def last_event(run: RunDirectory) -> dict[str, Any]:
    return run.read_events()[-1]


def scraped(monitor: RunMonitor) -> dict[str, float]:
    """What is served once all is written."""
    monitor.flush()
    return served(monitor)


def served(monitor: RunMonitor) -> dict[str, float]:
    """Value of every series by name, with the labels other than the run."""
    with urllib.request.urlopen(monitor.status()["metrics_url"], timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        assert sample.labels.pop("run") == "first"
        found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found
