"""What some work beside a training costs it: runs without and with it take turns on a Ray cluster on this machine.

Each round has one run of either kind, which take turns in being the first; what counts are medians over rounds of the
seconds of a step, saves included, and of the ranks' CPU seconds. Other work on the machine spoils the figures: rounds
that differ by more than the goal say so.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import psutil
from patience import done
from ray_nodes import Cluster

from jobs.run.directory import FINAL_STATES, RunDirectory

SIDES = ("without", "with")
WARM_STEPS = 5
"""Steps of a run that are not counted: of the first ones a rank allocates and reads ahead."""
PATIENCE_SECONDS = 7200.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Training:
    """What one run took."""

    mean_seconds: float
    """Of a step, with what it waited for saves."""
    median_seconds: float
    """Of a step."""
    cpu_seconds: float
    """Of all ranks, for a step."""
    made: int
    """Pieces of the work beside it, while it trained or right after."""
    made_cpu_seconds: float
    """Of the processes that did it, as long as the run trained."""


Rounds = Mapping[str, Sequence[Training]]


@dataclass(frozen=True)
class Work:
    """What is done beside the training."""

    name: str
    """In the plural, for people."""
    with_it: str
    """The field of the recipe by which a run has it."""
    without_it: str
    """That by which it has none."""
    process: str
    """A part of the name of those that do it."""
    count: Callable[[RunDirectory], int]
    """How often a run that ended had it done."""
    goal: float
    """Share by which it may slow the training."""


def measure(cluster: Cluster, recipe: Sequence[str], work: Work, rounds: int) -> dict[str, list[Training]]:
    """Train by turns without and with the work.

    Args:
        cluster: With the nodes on which it trains.
        recipe: Its name, and `field=value`.
        work: Beside it.
        rounds: Runs of each kind.
    """
    found: dict[str, list[Training]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            name = f"{side}-{number}"
            field = work.with_it if side == "with" else work.without_it
            done(cluster.convmae("submit", *recipe, field, "--run", name))
            training = watched(cluster, cluster.run(name), work)
            print(f"{name}: {json.dumps(asdict(training))}", file=sys.stderr, flush=True)
            found[side].append(training)
    return found


def watched(cluster: Cluster, run: RunDirectory, work: Work) -> Training:
    """Wait for a run's end; what it took, from its history and from the processes of its ranks."""
    seen: list[tuple[int, float]] = []  # of each step that was met: CPU seconds of all ranks so far
    working = 0.0
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (heartbeat := run.read_heartbeat()).get("state") not in FINAL_STATES:
        assert time.monotonic() < deadline, f"{run.name} did not end"
        for _ in range(10):  # between two looks at the heartbeat, which is written every two seconds
            step, used = live_step(heartbeat.get("metrics_url")), cpu_seconds(cluster, "RayTrainWorker")
            if step > max(WARM_STEPS, seen[-1][0] if seen else 0) and used:
                seen.append((step, used))
                working = cpu_seconds(cluster, work.process) or working
            time.sleep(POLL_SECONDS)
    assert heartbeat["state"] == "finished", f"{run.name} {heartbeat['state']}: {run.read_events()[-3:]}"
    assert len(seen) > 1, f"{run.name} was too short to be measured: give it more epochs"
    steps = [row["step_seconds"] for row in run.read_history()][WARM_STEPS:]
    (first, before), (last, after) = seen[0], seen[-1]
    per_step = (after - before) / max(1, last - first)
    return Training(statistics.mean(steps), statistics.median(steps), per_step, work.count(run), working)


def live_step(metrics_url: str | None) -> int:
    """Steps that a run has done, from its metrics; 0 where they are not there."""
    with contextlib.suppress(OSError, ValueError):
        if metrics_url:
            with urllib.request.urlopen(metrics_url, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            return int(next((float(line.split()[-1]) for line in lines if line.startswith("convmae_step{")), 0))
    return 0


def cpu_seconds(cluster: Cluster, title: str) -> float:
    """CPU seconds so far of the cluster's processes whose name has `title`."""
    total = 0.0
    for process in _family(cluster):
        with contextlib.suppress(psutil.Error):
            if title in process.name():
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _family(cluster: Cluster) -> Iterator[psutil.Process]:
    for node in (cluster.head, *cluster.nodes):
        with contextlib.suppress(psutil.Error):
            yield from psutil.Process(node.process.pid).children(recursive=True)


def slowdowns(rounds: Rounds, field: str) -> list[float]:
    """Of each round, the share by which a figure is larger with the work."""
    pairs = zip(rounds["with"], rounds["without"], strict=True)
    return [getattr(ours, field) / getattr(plain, field) - 1 for ours, plain in pairs]


def report(rounds: Rounds, work: Work, *, cpus: int, cores: int) -> list[str]:
    """The table, and the verdict."""
    width = len(work.name) + 10
    lines = [f"training on {cpus} of {cores} cores; medians of {len(rounds['with'])} runs of each kind"]
    lines.append(f"{'':{width}}{'s a step':>10}{'median':>10}{'CPU s a step':>14}{'made':>8}{'their CPU s':>13}")
    for side, runs in rounds.items():
        middle = {name: statistics.median(getattr(run, name) for run in runs) for name in Training.__annotations__}
        figures = f"{middle['mean_seconds']:>10.4f}{middle['median_seconds']:>10.4f}{middle['cpu_seconds']:>14.4f}"
        made = f"{middle['made']:>8.0f}{middle['made_cpu_seconds']:>13.1f}"
        lines.append(f"{f'{side} {work.name}':{width}}{figures}{made}")
    slower, cpu = slowdowns(rounds, "mean_seconds"), slowdowns(rounds, "cpu_seconds")
    slowdown = statistics.median(slower)
    verdict = "reached" if slowdown <= work.goal else "NOT reached"
    each = ", ".join(f"{one:+.1%}" for one in slower)
    lines.append(f"slower by {slowdown:+.1%}, CPU of the ranks {statistics.median(cpu):+.1%} ({each} in each round)")
    lines.append(f"goal <= {work.goal:.0%}: {verdict}")
    if max(slower) - min(slower) > work.goal:
        lines.append("rounds differ by more than the goal: take more of them, or an idle machine")
    if cpus >= cores:
        lines.append(f"no core is free beside the training: {work.name} had what the scheduler left them")
    return lines
