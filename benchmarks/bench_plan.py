"""The cost of a plan over 2,000,000,000 samples in 200,000 shards: `make bench-plan`.

Makes a manifest of that size (29 MB), then measures, each in a fresh process: `convmae inspect` on it, and opening a
rank's stream at an arbitrary step, from the manifest to the index rows of the first batch and to those of the windows
behind it. The 94 GB of indexes are served by a stand-in for the object store, which makes the pages that are asked for
and waits as long as a store would. Prints wall seconds, peak RSS, and requests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.load.dataset import Dataset
from pipeline.load.decode_threads import READ_THREADS  # brings torch, so that the peak is that of a rank
from pipeline.load.read_ahead import ReadAhead
from pipeline.load.shard_reader import Sample
from pipeline.order.sample_order import Order
from pipeline.shard.index_pages import CRC_BYTES, HEAD, PAGE_ROWS, Pages, row_type
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardTable
from pipeline.store.storage import Storage

SAMPLES_PER_SHARD = 10_000
SAMPLE_BYTES = 110_000
KEY_BYTES, EXTENSION_BYTES = 9, 3
ROW_TYPE = row_type(KEY_BYTES, EXTENSION_BYTES)
SEED = 0


def write_manifest(url: str, shards: int) -> None:
    """A dataset whose indexes were never written."""
    numbers = range(shards)
    table = ShardTable(
        names=[f"part/{n:06d}" for n in numbers],
        samples=[SAMPLES_PER_SHARD] * shards,
        tar_bytes=[SAMPLES_PER_SHARD * SAMPLE_BYTES] * shards,
        index_sha256=[_digest(n) for n in numbers],
        key_bytes=[KEY_BYTES] * shards,
        extension_bytes=[EXTENSION_BYTES] * shards,
        etags=[f'"{n:032x}-132"' for n in numbers],
        tars=[""] * shards,
    )
    Manifest(2, "synthetic", (), 0, table).save(Storage(), url, [])


@dataclass(frozen=True)
class IndexStandIn(Storage):
    """A store that serves the manifest from disk, and any page of any index from a formula, after a store's latency."""

    latency_seconds: float = 0.0
    requests: list[int] = field(default_factory=list, hash=False, compare=False)

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:  # noqa: ARG002
        """The pages that lie there."""
        time.sleep(self.latency_seconds)
        self.requests.append(length)
        shard = int(url.rpartition("/")[2].removesuffix(".index"))
        first = (offset - len(HEAD)) // (PAGE_ROWS * ROW_TYPE.itemsize + CRC_BYTES)
        pages = Pages(SAMPLES_PER_SHARD, ROW_TYPE, _digest(shard))
        return b"".join(pages.encode_page(page, table) for page, table in _pages(pages, first, length))


def _pages(pages: Pages, first: int, length: int) -> Sequence[tuple[int, Any]]:
    found, page = [], first
    while page < pages.count and pages.range(first, page + 1)[1] <= length:
        places = np.arange(page * PAGE_ROWS, min(SAMPLES_PER_SHARD, (page + 1) * PAGE_ROWS))
        table = np.zeros(len(places), ROW_TYPE)
        table["offset"] = places * SAMPLE_BYTES + 512
        table["length"] = SAMPLE_BYTES - 1024
        table["height"] = table["width"] = 400
        table["key"] = [f"{place:09d}" for place in places.tolist()]
        table["extension"] = "jpg"
        found.append((page, table))
        page += 1
    return found


def _digest(shard: int) -> str:
    return f"{(shard * 0x9E3779B97F4A7C15 + 1) % 2**256:064x}"


class _IndexOnly(Dataset):
    """A store that stops where image bytes would be read."""

    def read_each(self, sample_ids: Any, *_: Any, **__: Any) -> list[Any]:
        return [
            Sample(found.id, found.row.key, "", found.row.member, 0, b"", None, "") for found in self.rows(sample_ids)
        ]


def open_stream(
    url: str, *, lanes: int, world_size: int, rank: int, step: int, windows: bool, latency_seconds: float
) -> dict[str, int]:
    """From nothing to the rows of the first batch, or to those of all that is open behind it."""
    storage = IndexStandIn(latency_seconds=latency_seconds)
    dataset = _IndexOnly.open(storage, url)
    order = Order(dataset.samples, 4096, lanes, SEED)
    if not windows:
        dataset.rows(order.rank_batch(step, rank, world_size))
    else:
        with ThreadPoolExecutor(READ_THREADS) as executor:
            owned = order.rank_lanes(rank, world_size)
            ahead = ReadAhead(dataset, order, owned, range(step, step + 100), executor, whole_windows=True)
            for pending in [*ahead.request(step), *ahead.request(step + 1)]:
                pending.result()
    return {"requests": 1 + len(storage.requests), "index_bytes": sum(storage.requests)}


_LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes}))
"""
"""A process's peak begins with that of the one that started it, so the one that does must be small."""


def _fresh(*arguments: str) -> tuple[str, str]:
    """The output of a command, and its wall seconds and peak MB as text."""
    command = [sys.executable, "-c", _LAUNCHER, sys.executable, *arguments]
    output, measured = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.rstrip().rsplit("\n", 1)
    )
    usage = json.loads(measured)
    return output, f"{usage['seconds']:>7.1f}  {usage['peak_bytes'] / 1e6:>7.0f}"


def main() -> None:
    """Make the manifest, run the cases, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--latency-ms", type=float, default=20.0, help="of one request to the stand-in")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(open_stream(**json.loads(arguments.case))))
        return
    with tempfile.TemporaryDirectory(prefix="convmae-bench-plan-") as url:
        write_manifest(url, arguments.shards)
        size = (Path(url) / "manifest.json").stat().st_size
        samples = arguments.shards * SAMPLES_PER_SHARD
        print(f"{arguments.shards:,} shards, {samples:,} samples, manifest of {size / 1e6:.1f} MB")
        print("case                                       seconds  peak MB  requests  index kB")
        print(f"{'convmae inspect':<42} {_fresh('-m', 'jobs.cli.main', 'inspect', url)[1]}         1")
        for lanes, world_size, windows in ((256, 64, False), (256, 64, True), (64, 64, True), (256, 1, False)):
            case = {"url": url, "lanes": lanes, "world_size": world_size, "rank": world_size // 3}
            case |= {"step": 123_457, "windows": windows, "latency_seconds": arguments.latency_ms / 1000}
            output, usage = _fresh(__file__, "--case", json.dumps(case))
            name = f"{'windows' if windows else 'first batch'}, 1 of {world_size} ranks, {lanes} lanes"
            row = json.loads(output)
            print(f"{name:<42} {usage}  {row['requests']:>8,}  {row['index_bytes'] / 1e3:>8,.0f}", flush=True)


if __name__ == "__main__":
    main()
