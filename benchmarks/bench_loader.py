"""Images a second of our loader and of others, on one machine and the same JPEGs: `make bench-loader`.

Every figure is measured in a fresh process. Rounds are interleaved, so that what else the machine does meets all sides
alike; printed are medians over rounds, of wall and of CPU time. `loader_sides.py` says what each side does.

    python benchmarks/bench_loader.py [--images DIR] [--quick]

Without --images the photographs of the demonstration are cut into tiles. They are small, so that everything but
decoding weighs more than it does with photographs of the usual size. Loaders that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from loader_goals import Goal, Medians, goals
from loader_material import Material, copy_to, installed, make_material, s3_environment, signed_urls
from loader_measures import request
from loader_sides import BATCH, Place
from local_s3 import local_s3

from pipeline.access.s3_options import OBSTORE
from pipeline.image.restart_markers import PROGRAM
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage

MEMORY_EPOCHS = 20
PEERS = ("webdataset", "torch", "streaming", "litdata")
"""Sides that are others' loaders, by the package that each needs."""
PEERS_ON_S3 = ("webdataset", "streaming")
"""The torch side reads files; LitData refuses an S3 server without TLS."""


class FailedError(RuntimeError):
    """A process that measures ended with an error."""


@dataclass(frozen=True)
class Run:
    """One thing whose speed is measured."""

    side: str
    where: str
    """disk or s3; memory for the bare loop."""
    threads: int


class Bench:
    """Measures, and remembers."""

    def __init__(self, material: Material, storage: Storage, bucket: str, server: int) -> None:
        self.material = material
        self.has_marked = Path(material.marked).exists()
        """Whether there is a program that writes restart markers."""
        self.cores = os.cpu_count() or 1
        self._storage = storage
        self._bucket = bucket
        self._server = psutil.Process(server)
        self.speeds: dict[Run, list[dict[str, float]]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.failed: dict[Run, str] = {}
        """Others' loaders that ended with an error, and the error."""

    def runs(self) -> Iterator[Run]:
        """One round's, in order."""
        peers = [side for side in PEERS if installed(side)]
        yield Run("ours", "disk", self.cores)
        yield Run("bare", "memory", self.cores)
        if self.has_marked:
            yield Run("ours marked", "disk", self.cores)
            yield Run("bare marked", "memory", self.cores)
        yield Run("ours", "s3", self.cores)
        if installed(OBSTORE):
            yield Run("by obstore", "s3", self.cores)
        for side in peers:
            yield Run(side, "disk", self.cores)
        for side in peers:
            if side in PEERS_ON_S3:
                yield Run(side, "s3", self.cores)
        yield Run("ours", "disk", 1)
        yield Run("bare", "memory", 1)

    def round(self) -> None:
        """Measure every side once."""
        for run in self.runs():
            before = sum(self._server.cpu_times()[:2])
            try:
                found = self._measure("speed", self._place(run.where, run.threads), side=run.side)
            except FailedError as error:
                if run.side not in PEERS:
                    raise
                lines = [line for line in str(error).splitlines() if "Error" in line.partition(":")[0]]
                self.failed[run] = lines[-1].strip() if lines else "no reason given"
                continue
            served = sum(self._server.cpu_times()[:2]) - before if run.where == "s3" else 0.0
            self.speeds[run].append(found | {"server_seconds": served})
        place = self._place("disk", self.cores)
        steps = Dataset.open(Storage(), self.material.shards).samples // BATCH
        for name, at in (("ours, first batch at step 0", 0.0), ("ours, first batch at the middle", 0.5)):
            self.seconds[name].append(self._measure("first_batch", place, at=at)["seconds"])
        for name, decoded in (("webdataset, batches up to the middle", True), ("webdataset, undecoded", False)):
            found = self._measure("webdataset_skip", place, batches=steps // 2, decoded=decoded)
            self.seconds[name].append(found["seconds"])

    def memory(self, epochs: int) -> list[float]:
        """Resident MB at the end of each epoch."""
        found: list[float] = self._measure("memory", self._place("disk", self.cores), epochs=epochs)["megabytes"]
        return found

    def pixels(self) -> dict[str, float]:
        """Difference from PIL, in 1/255."""
        return self._measure("pixels", self._place("disk", self.cores))

    def medians(self) -> Medians:
        """Over the rounds so far."""
        rows = {(run.side, run.where, run.threads): rows for run, rows in self.speeds.items()}
        wall = {run: statistics.median(_speed(row) for row in found) for run, found in rows.items()}
        cpu = {run: 1 / statistics.median(_cpu_seconds(row) for row in found) for run, found in rows.items()}
        seconds = {name: statistics.median(values) for name, values in self.seconds.items()}
        return Medians(wall, cpu, seconds, self.cores)

    def _place(self, where: str, threads: int) -> Place:
        material = self.material
        tars = sorted(str(path) for path in Path(material.shards).glob("*.tar"))
        place = Place(
            paths=tuple(material.paths()),
            shards=material.shards,
            marked=material.marked,
            tars=tuple(tars),
            streaming=material.streaming,
            litdata=material.litdata,
            storage=Storage(),
            threads=threads,
            scratch="",
        )
        if where != "s3":
            return place
        names = {name: Storage.join(self._bucket, name) for name in ("shards", "streaming")}
        urls = [Storage.join(names["shards"], Path(tar).name) for tar in tars]
        return replace(place, **names, tars=signed_urls(self._storage, urls), storage=self._storage)

    def _measure(self, measure: str, place: Place, **arguments: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.material.root) as scratch:
            asked = request(measure, replace(place, scratch=scratch), **arguments)
            environment = os.environ | {"TMPDIR": scratch}  # Streaming leaves lock files
            environment |= s3_environment(place.storage) if place.storage.key else {}
            command = [sys.executable, str(Path(__file__).with_name("loader_measures.py"))]
            done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise FailedError(f"{measure} {arguments} failed\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def _speed(row: dict[str, float]) -> float:
    return row["images"] / row["wall_seconds"]


def _cpu_seconds(row: dict[str, float]) -> float:
    """CPU seconds of one image, the server's included."""
    return (row["cpu_seconds"] + row["server_seconds"]) / row["images"]


def print_speeds(bench: Bench) -> None:
    """A line for each side; CPU ms are those of an image, on s3 with the server's."""
    print(f"\n{'side':<12}{'from':<8}{'threads':>8}{'images/s':>10}{'CPU ms':>8}   each round")
    for run, rows in bench.speeds.items():
        speeds = [_speed(row) for row in rows]
        cpu = statistics.median(_cpu_seconds(row) for row in rows) * 1e3
        each = " ".join(f"{speed:.0f}" for speed in speeds)
        print(f"{run.side:<12}{run.where:<8}{run.threads:>8}{statistics.median(speeds):>10.0f}{cpu:>8.2f}   {each}")
    for run, error in bench.failed.items():
        print(f"{run.side:<12}{run.where:<8}failed: {error}")
    for side in PEERS:
        if not installed(side):
            print(f"{side:<12}not installed")
    if not bench.has_marked:
        print(f"{'ours marked':<12}{PROGRAM} is not installed")


def print_seconds(bench: Bench) -> None:
    """Times to a first batch."""
    print()
    for name, values in bench.seconds.items():
        print(f"{name:<40}{statistics.median(values):>8.3f} s   " + " ".join(f"{value:.3f}" for value in values))


def print_goals(found: list[Goal]) -> None:
    """Each goal, its figure, and whether it is reached; where the machine has other work, CPU time tells more."""
    print(f"\n{'goal':<50}{'wanted':>8}{'found':>8}{'by CPU':>8}")
    for goal in found:
        by_cpu = "" if goal.by_cpu is None else f"{goal.by_cpu:.3g}"
        verdict = "reached" if goal.reached else "NOT reached"
        print(f"{goal.name:<50}{goal.wanted:>8}{goal.found:>8.3g}{by_cpu:>8}   {verdict}")


def main() -> None:
    """Make the material, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="a folder of JPEGs, flat or in class folders")
    parser.add_argument("--count", type=int, default=2048, help="images at least; a smaller folder is repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round over 512 images")
    options = parser.parse_args()
    count, rounds = (512, 1) if options.quick else (options.count, options.rounds)
    with tempfile.TemporaryDirectory(prefix="convmae-bench-loader-") as folder:
        root = Path(folder)
        for name in ("material", "s3"):
            (root / name).mkdir()
        material = make_material(options.images, count, root / "material")
        with local_s3(root / "s3") as server:
            for name in ("shards", "streaming"):
                copy_to(server.storage, str(root / "material" / name), Storage.join(server.url, name))
            bench = Bench(material, server.storage, server.url, server.pid)
            print(f"{len(material.files)} images, {bench.cores} cores, {rounds} rounds, batches of {BATCH}", flush=True)
            for number in range(rounds):
                bench.round()
                print(f"round {number + 1} of {rounds}; load {os.getloadavg()[0]:.1f}", flush=True)
        megabytes = bench.memory(MEMORY_EPOCHS)
        pixels = bench.pixels()
    print_speeds(bench)
    print_seconds(bench)
    print(f"\nMB at the end of each of {MEMORY_EPOCHS} epochs: " + " ".join(f"{value:.0f}" for value in megabytes))
    print(f"difference from PIL: {pixels['mean']:.4f}/255, the worst image {pixels['worst_image']:.4f}/255")
    print_goals(goals(bench.medians(), megabytes, pixels["mean"]))


if __name__ == "__main__":
    main()
