"""Time from a failure to the first new step: `make bench-recovery`.

A head and nodes of one CPU each run the recipe `tiny` on photographs, on a real Ray cluster on this machine. By turns a
rank's process is killed, a node is killed, a node is added and a node is drained; in each round once where restarts are
fed by the store alone, and once by memory checkpoints. Printed are, over all rounds, the medians of what the run's own
event log says: how long no step was done, in which phase of the restart, and how many steps were done again.

    python benchmarks/bench_recovery.py [--rounds 3] [--calm-seconds 30] [--recipe tiny] [--set FIELD=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from patience import wait_until
from ray_nodes import Cluster, Node, ray_cluster

from jobs.metrics.recovery import PHASES
from jobs.run.directory import RunDirectory
from pipeline.ingest.photographs import cut_tiles

GOALS = {"worker killed": 8.0, "node killed": 20.0, "node added": 10.0}
"""Seconds down at most."""
PATIENCE_SECONDS = 300.0
IMAGES = 512
DRAIN_SECONDS = 15

SIDES = ("store", "memory")
SAVE_EVERY = 10
"""Steps between checkpoints in the store."""
HOLD_EVERY = 1
"""And between those in memory."""

Found = dict[str, list[dict[str, Any]]]


def measure(cluster: Cluster, rounds: int, calm_seconds: float, recipe: Sequence[str], kinds: Sequence[str]) -> Found:
    """Events `recovered` and what came of them, by what had happened and what fed the restarts.

    Args:
        cluster: Of two nodes.
        rounds: How often each thing happens on either side; a node is added twice in each.
        calm_seconds: How long the run trains undisturbed before each, so that processes that wait have imported.
        recipe: Its name, and `field=value`.
        kinds: What happens.
    """
    sharded(cluster)
    found: Found = defaultdict(list)
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            run = begin(cluster, f"{side}-{number}", HOLD_EVERY if side == "memory" else 0, recipe)
            for what, event in disturbed(cluster, run, calm_seconds, kinds):
                found[f"{what}, {side}"].append(event)
            stall = run.read_heartbeat().get(f"{'memory_' if side == 'memory' else ''}checkpoint_stall_seconds")
            print(f"a checkpoint, {side}: training stands still for {stall} s", file=sys.stderr, flush=True)
            done(cluster, "stop", run.url)
    return found


def disturbed(
    cluster: Cluster, run: RunDirectory, calm_seconds: float, kinds: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Have everything happen once to a run; what, and the events by which it restarted and trained again, as one."""
    found: list[tuple[str, dict[str, Any]]] = []

    def after(what: str, do: Callable[[], object]) -> None:
        time.sleep(calm_seconds)
        attempt = run.read_heartbeat()["attempt"]
        do()
        wait_until(what, lambda: recovered(run, attempt) is not None, PATIENCE_SECONDS)
        (start,) = (event for event in run.read_events() if event["attempt"] == attempt + 1 and "steps_redone" in event)
        event = recovered(run, attempt)
        assert event
        found.append((what, {**start, **event}))
        phases = ", ".join(
            f"{phase} {event[f'{phase}_seconds']:.1f}" for phase in PHASES if f"{phase}_seconds" in event
        )
        took = f"{event['down_seconds']:.1f} s ({phases}), {start['steps_redone']} redone"
        print(f"{what}: {took}, from {start['restored_from']}", file=sys.stderr, flush=True)
        settle(run)

    settle(run)
    if "worker" in kinds:
        after("worker killed", alive(cluster)[0].workers()[0].kill)
    if "node" in kinds:
        after("node killed", alive(cluster)[-1].kill)
        after("node added", cluster.add)
    if "drain" in kinds:
        leaves = alive(cluster)[-1]
        after("node drained", lambda: cluster.drain(leaves, DRAIN_SECONDS))
        after("node added", cluster.add)
    return found


def sharded(cluster: Cluster) -> None:
    """Make the dataset."""
    with tempfile.TemporaryDirectory() as folder:
        cut_tiles(Path(folder), IMAGES, seed=0)
        done(cluster, "shard", folder, f"{cluster.s3.url}/data", "--samples-per-shard", "128")


def begin(cluster: Cluster, name: str, hold_every: int, recipe: Sequence[str]) -> RunDirectory:
    """Submit a run that lasts."""
    fields = {
        "data": f"{cluster.s3.url}/data",
        "run_root": f"{cluster.s3.url}/runs",
        "cpus_per_worker": 1.0,
        "epochs": 100_000,
        "probes": "false",
        "checkpoint_every_steps": SAVE_EVERY,
        "memory_checkpoint_every_steps": hold_every,
    }
    given = {each.partition("=")[0] for each in recipe[1:]}
    ours = (f"{field}={value}" for field, value in fields.items() if field not in given)
    done(cluster, "submit", *recipe, *ours, "--run", name)
    return cluster.run(name)


def done(cluster: Cluster, *arguments: str) -> None:
    """Run a command to its end."""
    process = cluster.convmae(*arguments)
    out, err = process.communicate()
    assert process.returncode == 0, out + err


def settle(run: RunDirectory) -> None:
    """Wait until the run trains and has saved what it does."""
    attempt = run.read_heartbeat().get("attempt")

    def saved() -> bool:
        now = run.read_heartbeat()
        events = [event for event in run.read_events() if event["attempt"] == now.get("attempt")]
        return now.get("attempt") == attempt and any(event["kind"] == "checkpoint" for event in events)

    wait_until("a run", lambda: bool(run.read_heartbeat().get("attempt")), PATIENCE_SECONDS)
    attempt = run.read_heartbeat()["attempt"]
    wait_until("a checkpoint", saved, PATIENCE_SECONDS)


def alive(cluster: Cluster) -> list[Node]:
    """Nodes on which a rank trains."""
    return [node for node in cluster.nodes if node.workers()]


def recovered(run: RunDirectory, attempt: int) -> dict[str, Any] | None:
    """The event by which the attempt after this one has done its first step."""
    events = (event for event in run.read_events() if event["kind"] == "recovered" and event["attempt"] > attempt)
    return next(events, None)


def report(found: Found, goals: Mapping[str, float]) -> list[str]:
    """One line for each kind of event; `goals` are seconds down at most."""
    lines = [f"{'':24}{'down':>8}{'goal':>8}{'redone':>8}" + "".join(f"{phase:>12}" for phase in PHASES)]
    for what, events in sorted(found.items()):
        median = {key: statistics.median(event.get(f"{key}_seconds", 0.0) for event in events) for key in PHASES}
        down = statistics.median(event["down_seconds"] for event in events)
        redone = statistics.median(event["steps_redone"] for event in events)
        limit = goals.get(what.partition(",")[0])
        goal = f"{limit:.0f} s" if limit else ""
        phases = "".join(f"{median[phase]:>10.1f} s" for phase in PHASES)
        lines.append(f"{what:24}{down:>6.1f} s{goal:>8}{redone:>8.0f}{phases}")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calm-seconds", type=float, default=30.0, help="of training before each; 0: disturb at once")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the recipe, further ones")
    parser.add_argument("--kinds", nargs="*", default=["worker", "node", "drain"], help="what happens")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-recovery-") as folder, ray_cluster(Path(folder)) as cluster:
        cluster.add()
        cluster.add()
        recipe = (arguments.recipe, *arguments.set)
        found = measure(cluster, arguments.rounds, arguments.calm_seconds, recipe, arguments.kinds)
    print(json.dumps(found) if arguments.json else "\n".join(report(found, GOALS)))


if __name__ == "__main__":
    main()
