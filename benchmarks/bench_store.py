"""CPU time of reading from S3, by s3fs and by obstore, on a local S3 server: `make bench-store`.

Of each reader: CPU seconds of this process for a GB of large ranges and for 1,000 small ones, through `Storage`, by one
thread and by eight; wall seconds too, which other work on the machine alters more. Rounds are interleaved; printed are
medians over them, with the lowest and the highest. The server's own CPU time is not counted.

    python benchmarks/bench_store.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from local_s3 import local_s3

from pipeline.access.s3_options import OBSTORE, S3FS, S3Options
from pipeline.store.storage import Storage

OBJECT_BYTES = 64 << 20
GB = 10**9


@dataclass(frozen=True)
class Work:
    """Ranges that are read."""

    name: str
    unit: str
    length: int
    """Of each range."""
    count: int
    threads: int

    @property
    def units(self) -> float:
        """What the figures are divided by."""
        return self.length * self.count / GB if self.unit == "GB" else self.count / 1000


WORKS = [
    work
    for threads in (1, 8)
    for work in (
        Work("8 MiB ranges", "GB", 8 << 20, 64, threads),
        Work("1 MiB ranges", "GB", 1 << 20, 256, threads),
        Work("4 KiB ranges", "1,000", 4 << 10, 1000, threads),
    )
]


def measured(storage: Storage, url: str, work: Work) -> tuple[float, float]:
    """CPU and wall seconds of a unit."""
    places = [number * work.length % OBJECT_BYTES for number in range(work.count)]
    with ThreadPoolExecutor(work.threads) as threads:
        began, cpu_before = time.perf_counter(), time.process_time()
        lengths = set(threads.map(lambda place: len(storage.read_range(url, place, work.length)), places))
        used, passed = time.process_time() - cpu_before, time.perf_counter() - began
    assert lengths == {work.length}
    return used / work.units, passed / work.units


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    rounds = parser.parse_args().rounds
    found: dict[tuple[Work, str], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, local_s3(Path(folder)) as server:
        url = f"{server.url}/object"
        server.storage.write(url, os.urandom(OBJECT_BYTES))
        readers = {reader: replace(server.storage, s3=S3Options(reader=reader)) for reader in (S3FS, OBSTORE)}
        for storage in readers.values():
            storage.read(url)
        for _ in range(rounds):
            for work in WORKS:
                for reader, storage in readers.items():
                    found[work, reader].append(measured(storage, url, work))
    print(f"{rounds} rounds, load {os.getloadavg()[0]:.1f} at the end")
    print(f"\n{'':<14}{'threads':>8}  {'a':<7}{'reader':<9}{'CPU s':>7}{'wall s':>8}   CPU s, lowest to highest")
    for (work, reader), rows in found.items():
        cpu, wall = zip(*rows, strict=True)
        print(
            f"{work.name:<14}{work.threads:>8}  {work.unit:<7}{reader:<9}{statistics.median(cpu):>7.2f}"
            f"{statistics.median(wall):>8.2f}   {min(cpu):.2f} to {max(cpu):.2f}"
        )


if __name__ == "__main__":
    main()
