"""Images a second of `convmae shard` and `convmae index`, against a bare loop of the same work on the same cores.

The bare loop of `shard`: read, decode, CRC32C, webdataset.TarWriter, in as many processes as cores; no shuffle, no
restart, no index. That of `index`: read a tar through with `tarfile` and CRC32C its images. Rounds are interleaved.

    python benchmarks/bench_ingest.py --images DIR [--copies 5] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import google_crc32c
import ray
import webdataset

from jobs.data.index import index_dataset
from jobs.data.ingest import ingest
from pipeline.image.photo import photo_from
from pipeline.ingest.plan import Ingest, Sharding
from pipeline.ingest.source import Sources, Tars
from pipeline.ingest.sources import find_sources
from pipeline.store.storage import Storage

SAMPLES_PER_SHARD = 200


def bare_shard(work: tuple[str, list[str], int]) -> int:
    """One shard's share of the bare loop; returns images."""
    folder, paths, number = work
    with Path(folder, f"{number}.tar").open("wb") as file:
        writer = webdataset.TarWriter(file, encoder=False)
        for key, path in enumerate(paths):
            photo = photo_from(Path(path).read_bytes())
            google_crc32c.value(photo.data)
            writer.write({"__key__": f"{key:08d}", "jpg": photo.data, "cls": b"0"})
        writer.close()
    return len(paths)


def bare_index(path: str) -> int:
    """The bare loop over one tar; returns images."""
    count = 0
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                content = tar.extractfile(member)
                assert content is not None
                google_crc32c.value(content.read())
                count += 1
    return count


def timed(call: Callable[[], int]) -> float:
    """Images a second."""
    began = time.perf_counter()
    return call() / (time.perf_counter() - began)


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = find_sources(Storage(), options.images)
    assert isinstance(found, Sources)
    images = tuple(image for _ in range(options.copies) for image in found.images)
    sources = Sources(found.root, found.classes, images)
    cores = os.cpu_count() or 1
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores) as processes:
        run = Rounds(Path(folder), sources, processes)
        run.shard(Sources(found.root, found.classes, found.images[: 8 * cores]), 4)  # starts the workers
        rows: dict[str, list[float]] = {"bare shard": [], "shard": [], "bare index": [], "index": []}
        for _ in range(options.rounds):
            rows["bare shard"].append(timed(run.bare_shard))
            rows["shard"].append(timed(lambda: run.shard(sources, SAMPLES_PER_SHARD)))
            rows["bare index"].append(timed(run.bare_index))
            rows["index"].append(timed(run.index))
    medians = {name: statistics.median(values) for name, values in rows.items()}
    for name, values in rows.items():
        print(f"{name:<12}{medians[name]:8.0f} images/s  {' '.join(f'{value:.0f}' for value in values)}")
    print(f"shard / bare loop: {medians['shard'] / medians['bare shard']:.2f}")
    print(f"index / bare loop: {medians['index'] / medians['bare index']:.2f}")


class Rounds:
    """One of each measured thing, on the same images."""

    def __init__(self, folder: Path, sources: Sources, processes: ProcessPoolExecutor) -> None:
        self.folder = folder
        self.sources = sources
        self.processes = processes

    def shard(self, sources: Sources, samples_per_shard: int) -> int:
        """Make a dataset from nothing."""
        place = self.folder / "ours"
        shutil.rmtree(place, ignore_errors=True)
        job = Ingest(sources, Sharding(samples_per_shard))
        return ingest(Storage(), job, str(place), on_progress=lambda *_: None).manifest.samples

    def bare_shard(self) -> int:
        """The same images in the same order, in shards of the same size."""
        place = self.folder / "bare"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        paths = [str(Path(self.sources.root, image.path.text)) for image in self.sources.images]
        cuts = range(0, len(paths), SAMPLES_PER_SHARD)
        work = [(str(place), paths[cut : cut + SAMPLES_PER_SHARD], cut) for cut in cuts]
        return sum(self.processes.map(bare_shard, work))

    def index(self) -> int:
        """Index the bare loop's tars."""
        tars = find_sources(Storage(), str(self.folder / "bare"))
        assert isinstance(tars, Tars)
        shutil.rmtree(self.folder / "index", ignore_errors=True)
        result = index_dataset(Storage(), tars, str(self.folder / "index"), on_progress=lambda *_: None)
        return result.manifest.samples

    def bare_index(self) -> int:
        """Read the same tars through."""
        return sum(self.processes.map(bare_index, sorted(map(str, (self.folder / "bare").glob("*.tar")))))


if __name__ == "__main__":
    main()
