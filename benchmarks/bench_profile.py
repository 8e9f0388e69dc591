"""What `convmae profile` costs the steps that are not profiled.

A Ray cluster on this machine with two nodes trains a recipe with one worker on each. Again and again its last rank is
profiled, which the first one waits for: its steps tell how long all ranks stood still, and how much longer than before
the profile the steps after it took. Other work on the machine spoils the figures.

    python benchmarks/bench_profile.py [--recipe tiny] [--steps 5] [--profiles 5] [--apart 100]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_memory import NODES
from bench_probes import labelled
from patience import done, wait_until
from ray_nodes import ray_cluster

GOAL = 0.02
"""Share by which a profile may slow the steps that are not profiled."""
RUN = "profiled"
LONG_EPOCHS = 10_000
PATIENCE_SECONDS = 1200.0


@dataclass(frozen=True)
class Cost:
    """Of one profile, in seconds of a step, and shares of them."""

    before: float
    profiled: float
    still_seconds: float
    """By which the first step after the profile is longer."""
    after: float
    """Median of the steps from the third one."""
    slower: float
    """Mean of the steps after, the first one too, over that of those before."""


def costs(history: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], apart: int) -> Iterator[Cost]:
    """What each profile of a run cost.

    A rank tells how long a step took with the next one, and the row has the longest: so that of the first step after a
    profile has the time for which the profiled rank stood still, and that of the second one the same time, for which
    the others waited. It counts once.

    Args:
        history: Of the run.
        events: Of the run.
        apart: Steps to look at, before each and after it.
    """
    seconds = {row["step"]: row["step_seconds"] for row in history}
    for event in (event for event in events if event["kind"] == "profile"):
        last, first = event["step"], event["step"] - event["steps"] + 1
        before = [seconds[step] for step in range(first - apart, first)]
        after = [seconds[last + 1], *(seconds[step] for step in range(last + 3, last + 2 + apart))]
        usual = statistics.median(before)
        profiled = statistics.median(seconds[step] for step in range(first, last + 1))
        slower = statistics.mean(after) / statistics.mean(before) - 1
        yield Cost(usual, profiled, after[0] - usual, statistics.median(after[1:]), slower)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5, help="of each profile")
    parser.add_argument("--profiles", type=int, default=5)
    parser.add_argument("--apart", type=int, default=100, help="steps looked at, before a profile and after it")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    cpus = max(1, cores // NODES)
    with tempfile.TemporaryDirectory(prefix="bench-profile-") as folder, ray_cluster(Path(folder)) as cluster:
        cluster.add(cpus)
        data = labelled(cluster, options.images)
        for _ in range(NODES - 1):
            cluster.add(cpus)
        fields = {
            "data": data,
            "run_root": f"{cluster.s3.url}/runs",
            "epochs": LONG_EPOCHS,
            "checkpoint_every_steps": 1_000_000,
            "memory_checkpoint_every_steps": 0,
            "milestone_epochs": [],
            "probes": "false",
            "min_workers": NODES,
            "max_workers": NODES,
            "cpus_per_worker": cpus,
            "standby": "false",
        }
        recipe = (options.recipe, *(f"{name}={value}" for name, value in fields.items()))
        done(cluster.convmae("submit", *recipe, "--run", RUN))
        run, last = cluster.run(RUN), 0
        for _ in range(options.profiles):
            goal = last + 10 + options.apart
            wait_until(f"step {goal}", lambda: run.read_heartbeat().get("step", 0) >= goal, PATIENCE_SECONDS)  # noqa: B023
            done(cluster.convmae("profile", RUN, "--rank", str(NODES - 1), "--steps", str(options.steps)))
            last = next(event["step"] for event in reversed(run.read_events()) if event["kind"] == "profile")
        wait_until("the end", lambda: run.read_heartbeat()["step"] > last + 10 + options.apart, PATIENCE_SECONDS)
        done(cluster.convmae("stop", RUN))
        found = list(costs(list(run.read_history()), run.read_events(), options.apart))
    print(f"{options.steps} steps of rank {NODES - 1} are profiled; {cpus * NODES} of {cores} cores train")
    print("     before  profiled  stood still     after  slower")
    for cost in found:
        figures = f"{cost.before:>9.3f} s{cost.profiled:>8.3f} s{cost.still_seconds:>11.2f} s{cost.after:>8.3f} s"
        print(f"{figures}{cost.slower:>+8.1%}")
    slower = statistics.median(cost.slower for cost in found)
    verdict = "reached" if slower <= GOAL else "NOT reached"
    print(f"the {options.apart} steps after a profile: slower by {slower:+.1%}; goal <= {GOAL:.0%}: {verdict}")


if __name__ == "__main__":
    main()
