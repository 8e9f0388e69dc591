"""How much probes slow the training beside which they are made: `make bench-probes`.

A Ray cluster on this machine with one node trains a recipe by turns without and with probes, which take the CPU time
that nothing else wants (see beside_training). Both sides save at the same steps; the weights of those that are probed
are copied, which counts.

Take a machine with cores to spare beside the training: it has `--cpus`, half of them by default. With `--cpus` of all
cores it is measured what probes take of cores that training wants whole.

    python benchmarks/bench_probes.py [--recipe tiny] [--cpus N] [--workers 1] [--epochs 40] [--every 5] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from beside_training import Work, measure, report
from patience import done
from ray_nodes import Cluster, ray_cluster

from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import PROBE_EVENT
from pipeline.ingest.photographs import cut_tiles

GOAL = 0.02
"""Share by which probes may slow the training."""


def probes_every(epochs: int) -> Work:
    """Probes after each so many epochs."""

    def count(run: RunDirectory) -> int:
        return sum(event["kind"] == PROBE_EVENT for event in run.read_events())

    return Work("probes", f"probe_epochs={epochs}", "probes=false", "ProbeProcess", count, GOAL)


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
        work = probes_every(options.every)
        rounds = measure(cluster, recipe, work, options.rounds)
    if options.json:
        print(json.dumps({side: [asdict(run) for run in runs] for side, runs in rounds.items()}))
    else:
        print("\n".join(report(rounds, work, cpus=options.cpus, cores=cores)))


if __name__ == "__main__":
    main()
