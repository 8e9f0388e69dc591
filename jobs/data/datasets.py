"""`convmae shard`, `index`, `verify` and `stats`, with their output: checks, then progress, then the result."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from jobs.cluster.session import Session
from jobs.errors import RunFailedError
from jobs.terminal import bytes_text, duration_text, print_json, progress_bar, say
from pipeline.access.places import normal
from pipeline.access.urls import is_local
from pipeline.errors import DamagedManifestError, DamagedTarsError, SourceError
from pipeline.image.channels import RGB_CHANNELS, RGB_PIXELS, PixelKind
from pipeline.ingest.plan import Ingest, Sharding
from pipeline.ingest.source import Sources, Tars
from pipeline.ingest.sources import find_sources
from pipeline.shard.manifest import MANIFEST_NAME, SKIPPED_NAME, Manifest
from pipeline.shard.tar_samples import IMAGE_EXTENSIONS
from pipeline.shard.verify import Fault
from pipeline.store.storage import Storage

if TYPE_CHECKING:
    from jobs.cluster.fan_out import Progress
    from jobs.data.verify import Verification


def shard_and_say(
    session: Session,
    source: str,
    destination: str,
    sharding: Sharding,
    *,
    salvage: bool = False,
    channels: int = RGB_CHANNELS,
) -> Manifest:
    """Shard what lies at `source`, and print the result.

    Raises:
        UserError: Bad input, found before a cluster is needed if possible.
    """
    _refuse_within(source, destination)
    job = Ingest(find_sources(session.storage, source), sharding, channels)
    session.storage.check(destination, write=True, shared=True, exclusive=True)
    session.connect()
    from jobs.data.ingest import ingest

    _say_skipped(job.found)
    with _shown("skipped") as show, _damage_listed():
        result = ingest(session.storage, job, destination, salvage=salvage, on_progress=show, on_wait=_say_waiting)
    done = f"{result.shards_written} written, {result.shards_kept} kept"
    _say_made(destination, result.manifest, done, result.skipped, result.bad_labels)
    _say_unread(result.unread)
    return result.manifest


def index_and_say(
    session: Session, url: str, out: str, *, deep: bool, salvage: bool, pixels: PixelKind = RGB_PIXELS
) -> Manifest:
    """Index the tars at `url`, and print the result.

    Raises:
        UserError: Bad input, found before a cluster is needed if possible; damaged tars.
    """
    found = find_sources(session.storage, url)
    if not isinstance(found, Tars):
        raise SourceError(
            "URL", "must be a tar, a folder of tars or a pattern of them", url, "`convmae shard` takes it"
        )
    destination = out or normal(found.root)
    session.storage.check(destination, write=True, shared=True, exclusive=True)
    session.connect()
    from jobs.data.index import index_dataset

    _say_skipped(found)
    with _shown("skipped") as show, _damage_listed():
        result = index_dataset(
            session.storage,
            found,
            destination,
            deep=deep,
            salvage=salvage,
            pixels=pixels,
            on_progress=show,
            on_wait=_say_waiting,
        )
    done = f"{result.tars_read} read, {result.tars_kept} kept"
    _say_made(destination, result.manifest, done, result.skipped, result.bad_labels)
    _say_unread(result.unread)
    return result.manifest


def verify_and_say(session: Session, url: str, *, deep: bool, as_json: bool) -> None:
    """Verify a data set, and print its faults.

    Raises:
        UserError: There is no data set.
        RunFailedError: It has a fault, or its manifest cannot be read.
    """
    session.storage.check(url, write=False, shared=True)
    try:
        Manifest.load(session.storage, url)
    except DamagedManifestError as error:
        _say_damaged(url, error, deep=deep, as_json=as_json)
        raise RunFailedError(f"{url} has a damaged manifest") from None
    session.connect()
    from jobs.data.verify import verify_dataset

    with _shown("faults", sys.stderr if as_json else sys.stdout) as show:
        result = verify_dataset(session.storage, url, deep=deep, on_progress=show)
    manifest = result.manifest
    if as_json:
        print_json(_as_json(url, result, deep=deep))
    else:
        for fault in result.faults:
            say(fault.line)
        looked = "read and decoded" if deep else "read"
        say(
            f"{url}: {manifest.samples} images in {len(manifest.shards)} shards ({bytes_text(manifest.tar_bytes)}) "
            f"{looked} in {duration_text(result.seconds)}, {len(result.faults)} faults"
        )
    if result.faults:
        raise RunFailedError(f"{url} has {len(result.faults)} faults")


def measure_and_say(session: Session, url: str, *, samples: int, as_json: bool) -> None:
    """Measure a data set, and print what its pixels are like, and what its manifest says of them.

    Raises:
        UserError: There is no data set, or no image that decodes.
    """
    session.storage.check(url, write=False, shared=True)
    Manifest.load(session.storage, url)
    session.connect()
    from jobs.data.statistics import measure_dataset

    with _shown("bad", sys.stderr if as_json else sys.stdout) as show:
        result = measure_dataset(session.storage, url, samples=samples, on_progress=show)
    manifest, pixels = result.manifest, result.pixels
    recorded = manifest.pixels.to_json() if manifest.pixels else None
    if as_json:
        about = {"url": url, "digest": manifest.digest, "samples": manifest.samples, "channels": pixels.channels}
        print_json({**about, **pixels.to_json(), "manifest": recorded, "seconds": round(result.seconds, 3)})
        return
    read = "all" if pixels.images == manifest.samples else f"{pixels.images} of"
    kind = f"{pixels.channels} channels" + ("" if pixels.kind.is_photographic else f" of {pixels.bits} bits")
    say(f"{url}: {read} {manifest.samples} images read in {duration_text(result.seconds)}, {kind}")
    say(f"image_mean={list(pixels.mean)} image_std={list(pixels.std)}".replace(", ", ","))
    if manifest.pixels is None:
        say("its manifest says nothing of them: runs take ImageNet's, unless their recipe has these two fields")


def _say_damaged(url: str, error: DamagedManifestError, *, deep: bool, as_json: bool) -> None:
    """Without a manifest the shards of a data set are unknown: this is the only fault, and nothing else is checked."""
    fault = Fault(MANIFEST_NAME, None, None, f"{error.rule}; {error.remedy}")
    if as_json:
        nothing = {"digest": None, "shards": 0, "samples": 0, "bytes": 0, "deep": deep, "seconds": 0.0}
        print_json({"url": url, **nothing, "faults": [asdict(fault)]})
    else:
        say(fault.line)


def _as_json(url: str, result: Verification, *, deep: bool) -> dict[str, object]:
    return {
        "url": url,
        "digest": result.manifest.digest,
        "shards": len(result.manifest.shards),
        "samples": result.manifest.samples,
        "bytes": result.manifest.tar_bytes,
        "deep": deep,
        "seconds": round(result.seconds, 3),
        "faults": [asdict(fault) for fault in result.faults],
    }


def _say_made(destination: str, manifest: Manifest, done: str, skipped: int, bad_labels: int) -> None:
    say(
        f"{destination}: {manifest.samples} images in {len(manifest.shards)} shards ({done}), {skipped} sources skipped"
    )
    if skipped:
        say(f"skipped, with reasons: {Storage.join(destination, SKIPPED_NAME)}")
    if bad_labels:
        say(f"{bad_labels} labels are not integers from 0 up; their images have none")


def _say_unread(unread: str) -> None:
    if unread:
        say(f"{unread}; convert or rename them: read are {', '.join(IMAGE_EXTENSIONS)}")


def _refuse_within(source: str, destination: str) -> None:
    """Refuse a destination inside the sources: what is written there would be a source the next time."""
    outer, inner = (_resolved(place).rstrip("/") + "/" for place in (source, destination))
    if inner.startswith(outer):
        raise SourceError("destination", "must not lie in the source's folder", destination, "choose another place")


def _resolved(place: str) -> str:
    url = normal(place)
    return os.path.realpath(url) if is_local(url) else url


def _say_skipped(found: Sources | Tars) -> None:
    names = found.skipped_files
    if names:
        kind = "packed archives" if isinstance(found, Tars) else "files without an image's name"
        say(f"skipping {len(names)} {kind}: {_first(names)}")
    if isinstance(found, Sources) and found.beside_classes:
        beside = found.beside_classes
        where = f"{len(beside)} of {len(found.images)} images lie beside the class folders ({_first(beside)})"
        say(f"no image gets a label, since {where}; to have labels, move them into a class folder")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _say_waiting(holder: str) -> None:
    say(f"a lease is held by {holder}; watching for up to 30 s whether it still works")


@contextmanager
def _damage_listed() -> Iterator[None]:
    """Print every damaged tar, before the error counts them."""
    try:
        yield
    except DamagedTarsError as error:
        for line in error.lines:
            say(line)
        raise


@contextmanager
def _shown(bad: str, stream: TextIO | None = None) -> Iterator[Callable[[str, Progress], None]]:
    """Show the stages of a job, one after the other; yields `show(stage, progress)`."""
    stage, began = "", 0.0
    with ExitStack() as bars:
        draw: Callable[[int, int, str], None] | None = None

        def show(name: str, now: Progress) -> None:
            nonlocal stage, began, draw
            if draw is None or name != stage:
                bars.close()
                stage, began = name, time.monotonic()
                draw = bars.enter_context(progress_bar(name, stream or sys.stdout))
            draw(now.done, now.total, progress_text(now, time.monotonic() - began, bad))

        yield show


def progress_text(now: Progress, seconds: float, bad: str) -> str:
    """The figures of a fan-out in one line; what was kept does not count towards the rate."""
    fresh = now.done - now.kept
    rate = (now.samples - now.kept_samples) / seconds if seconds else 0.0
    remaining = seconds / fresh * (now.total - now.done) if fresh else None
    return f"{now.samples} images · {rate:.0f} images/s · {now.bad} {bad} · ETA {duration_text(remaining)}"
