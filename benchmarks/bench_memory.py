"""What memory checkpoints cost a training: `make bench-memory`.

A Ray cluster on this machine with two nodes trains a recipe with one worker on each, by turns without memory
checkpoints and with those that are as frequent as `auto` makes them (see beside_training). Neither side saves to the
store before its end. The nodes have all cores between them, so what holders compute is taken from the ranks.

    python benchmarks/bench_memory.py [--recipe tiny] [--epochs 20] [--rounds 3] [--every auto]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from bench_probes import labelled
from beside_training import Work, measure, report
from ray_nodes import ray_cluster

from jobs.run.directory import RunDirectory

GOAL = 0.01
"""Share by which memory checkpoints may slow the training."""
NODES = 2
_NEVER = 1_000_000


def memory_checkpoints(every: str) -> Work:
    """Memory checkpoints, so many steps apart, or `auto`."""
    field = "memory_checkpoint_every_steps"

    def count(run: RunDirectory) -> int:
        return int(run.read_heartbeat().get("memory_checkpoints_total", 0))

    return Work("memory checkpoints", f"{field}={every}", f"{field}=0", "MemoryHolder", count, GOAL)


def main() -> None:
    """Measure and print."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", default="auto", help="steps between two, or auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the recipe, further ones")
    options = parser.parse_args()
    cpus = max(1, cores // NODES)
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder, ray_cluster(Path(folder)) as cluster:
        cluster.add(cpus)
        data = labelled(cluster, options.images)
        for _ in range(NODES - 1):  # after the first has unpacked our code, into a folder that they share
            cluster.add(cpus)
        fields = {
            "data": data,
            "run_root": f"{cluster.s3.url}/runs",
            "epochs": options.epochs,
            "warmup_epochs": options.epochs / 20,
            "milestone_epochs": [],
            "checkpoint_every_steps": _NEVER,
            "probes": "false",
            "min_workers": NODES,
            "max_workers": NODES,
            "cpus_per_worker": cpus,
            "standby": "false",
        }
        recipe = (options.recipe, *(f"{name}={value}" for name, value in fields.items()), *options.set)
        work = memory_checkpoints(options.every)
        rounds = measure(cluster, recipe, work, options.rounds)
    print("\n".join(report(rounds, work, cpus=cpus * NODES, cores=cores)))


if __name__ == "__main__":
    main()
