"""Half an hour of kills at random: the run finishes on its trajectory, and nothing grows. Its own command: `make soak`.

CONVMAE_SOAK_MINUTES sets how long kills go on, CONVMAE_SOAK_SEED which; the seed is in the log of a test that fails.
"""

from __future__ import annotations

import logging
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from patience import wait_until
from testbed import Command, family, losses, processes, ranks, small_recipe

from jobs.checkpoint.checkpoint import committed_steps
from jobs.recipe.schedule import order_of
from jobs.run.directory import RunDirectory
from jobs.stack.record import Stack
from pipeline.order.sample_order import ConsumedDigest
from pipeline.shard.manifest import Manifest

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]

MINUTES = float(os.environ.get("CONVMAE_SOAK_MINUTES", "30"))
SEED = int(os.environ.get("CONVMAE_SOAK_SEED", str(int(time.time()))))
BETWEEN_KILLS_SECONDS = (30.0, 60.0)
FIELDS = {"epochs": 100_000, "checkpoint_every_steps": 10, "max_restarts_without_progress": 20, "standby": True}
GROWTH = 1.25
"""The median of the last third of the samples may be so many times that of the first."""


@dataclass(frozen=True)
class Sample:
    """What the stack and the run hold, right after a recovery."""

    memory_bytes: int
    descriptors: int
    threads: int
    processes: int
    temporary_files: int
    shared_memory_files: int

    @classmethod
    def of(cls, stack: Stack) -> Sample:
        """Of every process of the stack, and of what they leave on this machine."""
        theirs = family(stack)
        memory = descriptors = threads = 0
        for process in theirs:
            try:
                with process.oneshot():
                    memory += process.memory_info().rss
                    descriptors += process.num_fds()
                    threads += process.num_threads()
            except psutil.NoSuchProcess:
                continue
        scratch = [*Path("/tmp").glob("convmae-*"), *stack.settings.run_dir.joinpath("tmp").iterdir()]
        return cls(memory, descriptors, threads, len(theirs), len(scratch), len(list(Path("/dev/shm").iterdir())))


def victims(what: str, run: RunDirectory, stack: Stack) -> list[int]:
    """Processes that could be killed now."""
    if what == "rank":
        return [process.pid for process in ranks(stack)]
    if what == "driver":
        return [process.pid for process in processes(run.url, family(stack)) if "jobs.cli.main" in process.cmdline()]
    now = Stack.load(stack.settings.home)  # its keeper starts another server after each kill
    return [pid for pid in [now.status()["s3"].pid] if pid] if now else []


def recoveries(run: RunDirectory) -> list[str]:
    """What each restart was for, and how long no step was done."""
    events = run.read_events()
    reasons = {event["attempt"]: event["reason"] for event in events if event["kind"] == "restart"}
    found = [event for event in events if event["kind"] == "recovered"]
    return [f"{reasons[event['attempt']]}: {event['down_seconds']:.1f} s" for event in found]


def test_nothing_is_lost_and_nothing_grows(convmae: Command, data: str, local_stack: Stack) -> None:
    logger.warning("seed %d, %g minutes", SEED, MINUTES)
    random_ = random.Random(SEED)
    convmae("submit", *small_recipe(data, **FIELDS), "--run", "soak")
    run = convmae.run("soak")
    samples: list[Sample] = []
    killed: Counter[str] = Counter()
    until = time.monotonic() + MINUTES * 60
    while True:
        restarts = killed["rank"] + killed["driver"]
        wait_until("a recovery", lambda expected=restarts: len(recoveries(run)) == expected, 300)
        trained = run.read_heartbeat().get("step", 0)
        wait_until("training", lambda before=trained: run.read_heartbeat().get("step", 0) > before + 1, 300)
        samples.append(Sample.of(local_stack))
        if time.monotonic() > until:
            break
        time.sleep(random_.uniform(*BETWEEN_KILLS_SECONDS))
        what = random_.choice(["rank", "rank", "driver", "s3"])
        pid = random_.choice(victims(what, run, local_stack))
        logger.warning("%s; killing %s %d after step %d", samples[-1], what, pid, run.read_heartbeat()["step"])
        psutil.Process(pid).kill()
        killed[what] += 1
    convmae("stop", "soak")
    steps = run.read_heartbeat()["step"]
    assert committed_steps(run)[-1] == steps

    calm = {**FIELDS, "checkpoint_every_steps": 1000, "max_steps": steps}
    convmae("pretrain", *small_recipe(data, **calm), "--run", "calm", within_seconds=steps)  # a step a second will do
    assert losses(run) == pytest.approx(losses(convmae.run("calm")), rel=1e-5)
    order = order_of(run.read_recipe(), Manifest.load(run.storage, data).samples)
    consumed = [row["samples"] for row in run.read_history()]
    assert consumed == [str(ConsumedDigest.of(order.batch(step))) for step in range(steps)]
    logger.warning("killed %s; recoveries: %s", dict(killed), recoveries(run))
    third = len(samples) // 3
    assert third, f"{len(samples)} samples tell nothing of growth: give it more minutes"
    for field in Sample.__dataclass_fields__:
        first, last = (
            statistics.median(getattr(sample, field) for sample in part) for part in (samples[:third], samples[-third:])
        )
        assert last <= GROWTH * first + 4, f"{field} grew from {first} to {last}"
