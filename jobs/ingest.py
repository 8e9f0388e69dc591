"""Photographs to a data set on object storage, one Ray task per shard.

What a task does is in pipeline.shards; here is only who does what when: fail fast, fan out, commit last.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from pipeline.errors import SourceError, UserError
from pipeline.manifest import Manifest, existing_manifest
from pipeline.shards import ShardReport, ShardTask, plan_shards, write_shard
from pipeline.sources import find_sources
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

TASKS_PER_CPU = 2
"""In flight: enough that no core waits for the driver, few enough that a full disk stops the rest."""


@dataclass(frozen=True)
class IngestProgress:
    """How far an ingest has come."""

    shards_done: int
    shards: int
    samples: int
    skipped: int


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did."""

    manifest: Manifest
    shards_written: int
    shards_kept: int
    """Already finished by an earlier ingest."""
    skipped: int
    seconds: float


def ingest(
    storage: Storage,
    source: str,
    destination: str,
    *,
    samples_per_shard: int,
    seed: int,
    on_progress: Callable[[IngestProgress], None],
) -> IngestReport:
    """Make a data set of the images under `source`; the same call again goes on with what is missing.

    Ray must be initialised. Until the manifest is written, last of all, the data set does not exist for readers.

    Args:
        storage: Reaches both places from every node.
        source: Folder of images, or of class folders.
        destination: Folder or prefix; empty, half written by the same call, or finished by it.
        samples_per_shard: Images in a shard.
        seed: Of the shuffle.
        on_progress: Called in this process after every shard.

    Raises:
        SourceError: No images there, or none that decodes.
        StorageError: Either place cannot be used; found before any work starts where possible.
        DatasetError: The destination holds another data set.
    """
    began = time.monotonic()
    source, destination = Storage.absolute(source), Storage.absolute(destination)
    storage.check(source, write=False)
    sources = find_sources(storage, source)
    storage.check(destination, write=True)
    tasks = plan_shards(sources, samples_per_shard, seed)
    manifest = existing_manifest(storage, destination, tasks)
    if manifest is not None:
        return IngestReport(manifest, 0, len(tasks), manifest.skipped, time.monotonic() - began)

    reports: list[ShardReport] = []
    for report in _written(storage, destination, tasks):
        reports.append(report)
        on_progress(_progress(reports, len(tasks)))
    manifest = Manifest.of(tasks, reports, sources.classes)
    skipped = [item for report in sorted(reports, key=lambda report: report.name) for item in report.skipped]
    if not manifest.samples:
        remedy = f"the first of {len(skipped)} is {skipped[0].path}: {skipped[0].reason}"
        raise SourceError("source", "must have an image that decodes", source, remedy)
    manifest.save(storage, destination, skipped)
    kept = sum(report.kept for report in reports)
    return IngestReport(manifest, len(tasks) - kept, kept, len(skipped), time.monotonic() - began)


def _progress(reports: Sequence[ShardReport], shards: int) -> IngestProgress:
    samples = sum(report.samples for report in reports)
    return IngestProgress(len(reports), shards, samples, sum(len(report.skipped) for report in reports))


def _written(storage: Storage, destination: str, tasks: Sequence[ShardTask]) -> Iterator[ShardReport]:
    """Reports as the tasks finish, in any order, with a bounded number in flight."""
    write = ray.remote(num_cpus=1)(write_shard)
    shared = ray.put(storage)
    waiting = iter(tasks)
    cpus = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    width = max(1, TASKS_PER_CPU * int(cpus))
    running = [write.remote(shared, destination, task) for task in itertools.islice(waiting, width)]
    try:
        while running:
            done, running = ray.wait(running)
            yield _result(done[0])
            running += [write.remote(shared, destination, task) for task in itertools.islice(waiting, 1)]
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any) -> ShardReport:
    try:
        report: ShardReport = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    return report
