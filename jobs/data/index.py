"""Indexing of tars that were made elsewhere into a data set: one Ray task per tar, without rewriting them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.cluster.fan_out import Progress, Show, fan_out
from jobs.data.ingest import WORK_FOLDER, source_landmarks, sweep
from jobs.data.statistics import SAMPLED_IMAGES, measured_pixels
from jobs.run.shared_folder import Landmarks, lease_landmarks
from pipeline.access.places import normal
from pipeline.errors import DamagedTarsError, SourceError
from pipeline.image.channels import RGB_PIXELS, PixelKind
from pipeline.ingest.index_tar import IndexTask, TarReport, index_tar
from pipeline.ingest.source import Tar, Tars
from pipeline.shard.index import Skipped
from pipeline.shard.manifest import Made, Manifest, channel_marks, existing_manifest
from pipeline.shard.table import leads_away
from pipeline.shard.tar_samples import unread_kinds
from pipeline.store.lease import hold_lease
from pipeline.store.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexingReport:
    """The result of indexing."""

    manifest: Manifest
    tars_read: int
    tars_kept: int
    """Already indexed by an earlier call."""
    skipped: int
    bad_labels: int
    seconds: float
    unread: str = ""
    """Which samples have no supported image."""


def index_dataset(
    storage: Storage,
    tars: Tars,
    destination: str,
    *,
    deep: bool = False,
    salvage: bool = False,
    pixels: PixelKind = RGB_PIXELS,
    on_progress: Show,
    on_wait: Callable[[str], None] = logger.warning,
) -> IndexingReport:
    """Index tars, and write the manifest that makes them a data set; repeating the call resumes it.

    Ray must be initialised. All tars are read before damaged ones are refused, so that each is named.

    Args:
        storage: Reaches both places from every node.
        tars: What to index.
        destination: Where indexes and manifest go; may be the tars' own folder.
        deep: Decode every image, and skip those that fail; otherwise only their headers are read.
        salvage: Index what is left of damaged tars.
        pixels: To what images are to be decoded.
        on_progress: Called in this process.
        on_wait: Called with who seems to work there, when it takes time to find out whether they are alive.

    Raises:
        DamagedTarsError: Names every damaged tar with the offset; whole ones are indexed, and kept the next time.
        SourceError: No image in any tar.
        DatasetError: The destination holds another data set.
        LeaseHeldError: Another process works there.
    """
    began = time.monotonic()
    destination = normal(destination)
    tasks = [_task(tars, tar, deep=deep, salvage=salvage, pixels=pixels) for tar in tars.tars]
    work = Storage.join(destination, WORK_FOLDER)
    made: list[Made] = [*tasks, *channel_marks(pixels)]
    manifest, done, skipped = existing_manifest(storage, destination, made), [], list[Skipped]()
    if manifest is None:
        with hold_lease(storage, work, "convmae index", on_wait=on_wait) as lease:
            # The previous holder of the lease may have finished the data set, or made another one.
            manifest = existing_manifest(storage, destination, made)
            if manifest is None:
                landmarks = (*lease_landmarks("URL", destination, lease), *source_landmarks(storage, tars))

                def show(stage: str, progress: Progress) -> None:
                    lease.check()
                    on_progress(stage, progress)

                done = _indexed(storage, destination, tasks, show, landmarks=landmarks)
                manifest, skipped = _manifest(tars, made, done)
                measured = measured_pixels(
                    storage,
                    destination,
                    manifest,
                    pixels=pixels,
                    samples=SAMPLED_IMAGES,
                    on_progress=show,
                    landmarks=landmarks,
                )
                manifest = manifest.measured(measured)
                lease.check()
                manifest.save(storage, destination, skipped)
        sweep(work)
    read = sum(not report.kept for report in done)
    bad_labels = sum(report.bad_labels for report in done)
    seconds = time.monotonic() - began
    kept = len(tasks) - read
    return IndexingReport(manifest, read, kept, manifest.skipped, bad_labels, seconds, unread_kinds(skipped))


def _task(tars: Tars, tar: Tar, *, deep: bool, salvage: bool, pixels: PixelKind) -> IndexTask:
    """The task for one tar, whose name becomes that of a shard and of its index."""
    task = IndexTask(tars.root, tar, deep, salvage, pixels)
    if leads_away(task.name):
        remedy = "copy it to a key that begins with no slash, and has no '.', '..' or '://' in it"
        raise SourceError("tar", f"must have a name that is a path below {tars.root}", str(tar.path), remedy)
    return task


def _indexed(
    storage: Storage, destination: str, tasks: list[IndexTask], show: Show, *, landmarks: Landmarks
) -> list[TarReport]:
    """The report of every tar, by name."""
    progress = Progress(total=len(tasks))

    def tick() -> None:
        show("tars", progress)

    done: list[TarReport] = []
    for report in fan_out(index_tar, storage, destination, tasks, on_tick=tick, landmarks=landmarks):
        done.append(report)
        progress = progress.after(kept=report.kept, samples=report.samples, bad=report.skipped)
    return sorted(done, key=lambda report: report.name)


def _manifest(tars: Tars, made: Sequence[Made], done: list[TarReport]) -> tuple[Manifest, list[Skipped]]:
    damaged = [report for report in done if report.report is None]
    if damaged:
        lines = [f"{item.name}.tar, offset {fault.offset}: {fault.what}" for item in damaged for fault in item.faults]
        raise DamagedTarsError(lines, len(done))
    reports = [report.report for report in done if report.report is not None]
    skipped = [item for report in reports for item in report.skipped]
    manifest = Manifest.of(made, reports, ())
    if not manifest.samples:
        why = (
            f"the first of {len(skipped)} skipped is {skipped[0].path}: {skipped[0].reason}" if skipped else "none has"
        )
        raise SourceError("tars", "must have a supported image", tars.root, why)
    return manifest, skipped
