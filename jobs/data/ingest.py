"""Ingest of photographs into a data set on object storage, one Ray task per shard.

Tasks are in pipeline.ingest.writer; here is only their coordination: fail fast, take the lease, fan out, commit last.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.cluster.fan_out import Progress, Show, fan_out
from jobs.data.statistics import SAMPLED_IMAGES, measured_pixels
from jobs.run.shared_folder import Landmarks, file_landmarks, lease_landmarks
from pipeline.access.places import normal
from pipeline.access.urls import is_local
from pipeline.errors import DamagedTarsError, DatasetError, RefusedError, SourceError
from pipeline.ingest.plan import Ingest, ShardPlan, plan_shards
from pipeline.ingest.source import Sources, Tars
from pipeline.ingest.source_lists import sized
from pipeline.ingest.source_tars import TarImages, TarSummary, TarTask, class_folders, list_tar, read_listings
from pipeline.ingest.writer import write_shard
from pipeline.shard.index import Skipped
from pipeline.shard.manifest import Manifest, existing_manifest
from pipeline.shard.table import ShardReport
from pipeline.shard.tar_samples import unread_kinds
from pipeline.store.lease import Lease, hold_lease
from pipeline.store.storage import Storage

logger = logging.getLogger(__name__)

WORK_FOLDER = ".ingest"
"""Under the destination: claims, and listings of source tars; empty when all is done."""

LISTINGS = "tars"


@dataclass(frozen=True)
class IngestReport:
    """The result of an ingest."""

    manifest: Manifest
    shards_written: int
    shards_kept: int
    """Already finished by an earlier ingest."""
    skipped: int
    bad_labels: int
    seconds: float
    unread: str = ""
    """Which samples of source tars have no supported image."""


def ingest(
    storage: Storage,
    job: Ingest,
    destination: str,
    *,
    salvage: bool = False,
    on_progress: Show,
    on_wait: Callable[[str], None] = logger.warning,
) -> IngestReport:
    """Make a data set of what was found; repeating the call resumes it.

    Ray must be initialised. For readers the data set does not exist until its manifest is written, last of all. Only
    one process works on a destination at a time; when it dies, the next one takes over.

    Args:
        storage: Reaches both places from every node.
        job: The sources, and how they become shards.
        destination: Folder or prefix; empty, half written by the same call, or finished by it.
        salvage: Take what can be read of damaged source tars.
        on_progress: Called in this process.
        on_wait: Called with who seems to work there, when it takes time to find out whether they are alive.

    Raises:
        SourceError: No image there that decodes, or damaged tars.
        StorageError: Either place cannot be used; found before any work starts where possible.
        DatasetError: The destination holds another data set.
        LeaseHeldError: Another ingest works there.
    """
    began = time.monotonic()
    destination = normal(destination)
    storage.check(job.found.root, write=False, shared=True)
    storage.check(destination, write=True, shared=True, exclusive=True)
    _keep_apart(job, destination)
    work = Storage.join(destination, WORK_FOLDER)
    reports: list[ShardReport] = []
    manifest, bad_labels, unread = existing_manifest(storage, destination, [job]), 0, ""
    if manifest is None:
        with hold_lease(storage, work, "convmae shard", on_wait=on_wait) as lease:
            # The previous holder of the lease may have finished the data set, or made another one.
            manifest = existing_manifest(storage, destination, [job])
            if manifest is None:
                manifest, reports, found = _made(storage, job, destination, lease, on_progress, salvage=salvage)
                bad_labels, unread = found.bad_labels, unread_kinds(found.skipped)
        sweep(work)
    written = sum(not report.kept for report in reports)
    kept = len(manifest.shards) - written
    return IngestReport(manifest, written, kept, manifest.skipped, bad_labels, time.monotonic() - began, unread)


def _keep_apart(job: Ingest, destination: str) -> None:
    """Refuse to write beside source tars: shards may have the same names, and would replace them.

    Raises:
        SourceError: The destination is the folder of a source tar.
    """
    tars = job.found.tars if isinstance(job.found, Tars) else ()
    if any(tar.path.url(job.found.root).rpartition("/")[0] == destination.rstrip("/") for tar in tars):
        raise SourceError("destination", "must not be the source tars' own folder", destination, "choose another place")


def _made(
    storage: Storage, job: Ingest, destination: str, lease: Lease, on_progress: Show, *, salvage: bool
) -> tuple[Manifest, list[ShardReport], _Resolved]:
    """Write everything; returns the manifest, the report of each shard, and the resolved sources."""

    def show(stage: str, progress: Progress) -> None:
        lease.check()
        on_progress(stage, progress)

    landmarks = (*lease_landmarks("destination", destination, lease), *source_landmarks(storage, job.found))
    resolved = _resolved(storage, Storage.join(destination, WORK_FOLDER), job, show, landmarks, salvage=salvage)
    reports = _written(storage, destination, plan_shards(resolved.sources, job.sharding), show, landmarks)
    skipped = [*resolved.skipped, *(item for report in reports for item in report.skipped)]
    manifest = replace(Manifest.of([job], reports, resolved.sources.classes), skipped=len(skipped))
    if not manifest.samples:
        why = f"the first of {len(skipped)} is {skipped[0].path}: {skipped[0].reason}" if skipped else "it has none"
        raise SourceError("source", "must have an image that decodes", job.found.root, why)
    pixels = measured_pixels(
        storage,
        destination,
        manifest,
        pixels=job.pixels,
        samples=SAMPLED_IMAGES,
        on_progress=show,
        landmarks=landmarks,
    )
    manifest = manifest.measured(pixels)
    if job.sharding.encoding.restart_markers:
        manifest = manifest.marked()
    lease.check()
    manifest.save(storage, destination, skipped)
    for listing in resolved.listings:
        storage.delete(listing)
    return manifest, reports, resolved


def sweep(work: str) -> None:
    """Remove the work folder if folders exist by themselves, unless it is in use again."""
    if is_local(work):
        for folder in (Path(work, LISTINGS), Path(work)):
            with contextlib.suppress(OSError):
                folder.rmdir()


@dataclass(frozen=True)
class _Resolved:
    """The images, and what else was found with them."""

    sources: Sources
    skipped: tuple[Skipped, ...] = ()
    bad_labels: int = 0
    listings: tuple[str, ...] = ()


def source_landmarks(storage: Storage, found: Sources | Tars) -> Landmarks:
    """A landmark of the first image or tar, if it lies on a local disk."""
    paths = (item.path for item in found.tars) if isinstance(found, Tars) else (item.path for item in found.images)
    with contextlib.suppress(StopIteration, RefusedError):  # its reader reports what is wrong with its name
        return file_landmarks(storage, "source", found.root, next(paths).url(found.root))
    return ()


def _resolved(
    storage: Storage, work: str, job: Ingest, show: Show, landmarks: Landmarks, *, salvage: bool
) -> _Resolved:
    if isinstance(job.found, Tars):
        return _listed(storage, work, job.found, show, landmarks, salvage=salvage)
    return _Resolved(job.found if job.sharding.samples_per_shard is not None else sized(storage, job.found))


def _listed(storage: Storage, work: str, tars: Tars, show: Show, landmarks: Landmarks, *, salvage: bool) -> _Resolved:
    """Find the images in the source tars; one that an earlier call has listed is not read again."""
    progress = Progress(total=len(tars.tars))

    def tick() -> None:
        show("source tars", progress)

    tasks = (TarTask(tars.root, tar) for tar in tars.tars)
    found: list[TarSummary] = []
    listings = Storage.join(work, LISTINGS)
    for summary in fan_out(list_tar, storage, listings, tasks, on_tick=tick, landmarks=landmarks):
        found.append(summary)
        progress = progress.after(kept=summary.kept, samples=summary.samples, bad=len(summary.skipped))
    found.sort(key=lambda summary: summary.tar.path)
    faults = [(summary.tar.path, fault) for summary in found for fault in summary.faults]
    if faults and not salvage:
        raise DamagedTarsError([f"{path}, offset {fault.offset}: {fault.what}" for path, fault in faults], len(found))
    lost = [Skipped(f"{path} at byte {fault.offset}", fault.what) for path, fault in faults]
    by_folder = class_folders(found)
    classes = tuple(sorted(set(by_folder.values()))) or _classes(storage, tars.root)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = {folder: numbers[name] for folder, name in by_folder.items()}
    return _Resolved(
        Sources(tars.root, classes, TarImages(read_listings(storage, found), labels)),
        tuple(lost + [item for summary in found for item in summary.skipped]),
        sum(summary.bad_labels for summary in found),
        tuple(summary.listing for summary in found),
    )


def _classes(storage: Storage, root: str) -> tuple[str, ...]:
    """The names of the labels, if the source tars are a data set of ours."""
    try:
        return Manifest.load(storage, root).classes
    except DatasetError:
        return ()


def _written(
    storage: Storage, destination: str, plan: ShardPlan, show: Show, landmarks: Landmarks
) -> list[ShardReport]:
    """Every shard's report, in order."""
    progress = Progress(total=len(plan))

    def tick() -> None:
        show("shards", progress)

    reports: list[ShardReport] = []
    for report in fan_out(write_shard, storage, destination, plan, on_tick=tick, landmarks=landmarks):
        reports.append(report)
        progress = progress.after(kept=report.kept, samples=report.samples, bad=len(report.skipped))
    return sorted(reports, key=lambda report: report.name)
