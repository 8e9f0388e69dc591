"""How much probes slow the training beside which they are made: `make bench-probes`.

A Ray cluster on this machine with one node trains a recipe by turns without and with probes, which take the CPU time
that nothing else wants. Both sides save at the same steps; the weights of those that are probed are copied, which
counts. Each round has one run of either kind, which take turns in being the first; printed are medians over rounds of
the seconds of a step, saves included, and of the ranks' CPU seconds.

Take a machine with cores to spare beside the training: it has `--cpus`, half of them by default. With `--cpus` of all
cores it is measured what probes take of cores that training wants whole. Other work on the machine spoils the figures:
rounds that differ by more than the goal say so.

    python benchmarks/bench_probes.py [--recipe tiny] [--cpus N] [--workers 1] [--epochs 40] [--every 5] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from patience import done
from ray_nodes import Cluster, ray_cluster

from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import FINAL_STATES, RunDirectory
from jobs.run.probe_rows import PROBE_EVENT
from pipeline.ingest.photographs import cut_tiles

GOAL = 0.02
"""Share by which probes may slow the training."""
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
    probes: int
    """Made while it trained, or right after."""
    probe_cpu_seconds: float
    """Of the processes that made them, as long as the run trained."""


Rounds = Mapping[str, Sequence[Training]]


def measure(cluster: Cluster, recipe: Sequence[str], every: int, rounds: int) -> dict[str, list[Training]]:
    """Train by turns without and with probes.

    Args:
        cluster: With the node on which it trains.
        recipe: Its name, and `field=value`.
        every: Epochs between probes.
        rounds: Runs of each kind.
    """
    found: dict[str, list[Training]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            probing = (f"probe_epochs={every}",) if side == "with" else ("probes=false",)
            name = f"{side}-{number}"
            done(cluster.convmae("submit", *recipe, *probing, "--run", name))
            training = watched(cluster, cluster.run(name))
            print(f"{name}: {json.dumps(asdict(training))}", file=sys.stderr, flush=True)
            found[side].append(training)
    return found


def watched(cluster: Cluster, run: RunDirectory) -> Training:
    """Wait for a run's end; what it took, from its history and from the processes of its ranks."""
    seen: list[tuple[int, float]] = []  # of each step that was met: CPU seconds of all ranks so far
    probing = 0.0
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (heartbeat := run.read_heartbeat()).get("state") not in FINAL_STATES:
        assert time.monotonic() < deadline, f"{run.name} did not end"
        for _ in range(10):  # between two looks at the heartbeat, which is written every two seconds
            step, used = live_step(heartbeat.get("metrics_url")), cpu_seconds(cluster, "RayTrainWorker")
            if step > max(WARM_STEPS, seen[-1][0] if seen else 0) and used:
                seen.append((step, used))
                probing = cpu_seconds(cluster, "ProbeProcess") or probing
            time.sleep(POLL_SECONDS)
    assert heartbeat["state"] == "finished", f"{run.name} {heartbeat['state']}"
    assert len(seen) > 1, f"{run.name} was too short to be measured: give it more epochs"
    steps = [row["step_seconds"] for row in run.read_history()][WARM_STEPS:]
    (first, before), (last, after) = seen[0], seen[-1]
    probes = sum(event["kind"] == PROBE_EVENT for event in run.read_events())
    per_step = (after - before) / max(1, last - first)
    return Training(statistics.mean(steps), statistics.median(steps), per_step, probes, probing)


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
    """Of each round, the share by which a figure is larger with probes."""
    pairs = zip(rounds["with"], rounds["without"], strict=True)
    return [getattr(ours, field) / getattr(plain, field) - 1 for ours, plain in pairs]


def report(rounds: Rounds, *, cpus: int, cores: int) -> list[str]:
    """The table, and the verdict."""
    lines = [f"training on {cpus} of {cores} cores; medians of {len(rounds['with'])} runs of each kind"]
    lines.append(f"{'':16}{'s a step':>10}{'median':>10}{'CPU s a step':>14}{'probes':>8}{'their CPU s':>13}")
    for side, runs in rounds.items():
        middle = {name: statistics.median(getattr(run, name) for run in runs) for name in Training.__annotations__}
        figures = f"{middle['mean_seconds']:>10.4f}{middle['median_seconds']:>10.4f}{middle['cpu_seconds']:>14.4f}"
        lines.append(f"{side + ' probes':16}{figures}{middle['probes']:>8.0f}{middle['probe_cpu_seconds']:>13.1f}")
    slower, cpu = slowdowns(rounds, "mean_seconds"), slowdowns(rounds, "cpu_seconds")
    slowdown = statistics.median(slower)
    verdict = "reached" if slowdown <= GOAL else "NOT reached"
    each = ", ".join(f"{one:+.1%}" for one in slower)
    lines.append(f"slower by {slowdown:+.1%}, CPU of the ranks {statistics.median(cpu):+.1%} ({each} in each round)")
    lines.append(f"goal <= {GOAL:.0%}: {verdict}")
    if max(slower) - min(slower) > GOAL:
        lines.append("rounds differ by more than the goal: take more of them, or an idle machine")
    if cpus >= cores:
        lines.append("no core is free beside the training: probes had what the scheduler left them")
    return lines


def labelled(cluster: Cluster, images: int) -> str:
    """URL of a dataset of photographs' parts, whose classes are the photographs."""
    with tempfile.TemporaryDirectory() as folder:
        cut_tiles(Path(folder), images, seed=0)
        done(cluster.convmae("shard", folder, f"{cluster.s3.url}/data", "--samples-per-shard", "128"))
    return f"{cluster.s3.url}/data"


def main() -> None:
    """Measure and print."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=max(1, cores // 2), help="that all workers train on")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="epochs between probes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the recipe, further ones")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-probes-") as folder, ray_cluster(Path(folder)) as cluster:
        cluster.add(options.cpus)
        fields = {
            "data": labelled(cluster, options.images),
            "run_root": f"{cluster.s3.url}/runs",
            "epochs": options.epochs,
            "warmup_epochs": options.epochs / 20,
            "milestone_epochs": [],
            "checkpoint_every_steps": options.every * options.images // named_recipe(options.recipe).global_batch_size,
            "min_workers": options.workers,
            "max_workers": options.workers,
            "cpus_per_worker": options.cpus / options.workers,
            "standby": "false",
        }
        recipe = (options.recipe, *(f"{name}={value}" for name, value in fields.items()), *options.set)
        rounds = measure(cluster, recipe, options.every, options.rounds)
    if options.json:
        print(json.dumps({side: [asdict(run) for run in runs] for side, runs in rounds.items()}))
    else:
        print("\n".join(report(rounds, cpus=options.cpus, cores=cores)))


if __name__ == "__main__":
    main()
