"""Verification of a data set in parallel Ray tasks, one per shard."""

from __future__ import annotations

import time
from dataclasses import dataclass

from jobs.cluster.fan_out import Progress, Show, fan_out
from jobs.run.shared_folder import manifest_landmarks
from pipeline.image.channels import PixelKind
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry
from pipeline.shard.verify import Fault, Verdict, verify_shard
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class Verification:
    """The result of verifying a data set."""

    manifest: Manifest
    faults: tuple[Fault, ...]
    """By shard, in the manifest's order."""
    seconds: float


def verify_dataset(storage: Storage, url: str, *, deep: bool, on_progress: Show) -> Verification:
    """Read every byte of a data set and compare it with its manifest and indexes.

    Ray must be initialised.

    Args:
        storage: Reaches the data set from every node.
        url: Of the data set.
        deep: Also decode every image.
        on_progress: Called in this process.

    Raises:
        DatasetError: There is no manifest, or an unreadable one.
    """
    began = time.monotonic()
    manifest = Manifest.load(storage, url)
    progress = Progress(total=len(manifest.shards))

    def tick() -> None:
        on_progress("shards", progress)

    tasks = ((entry, deep, manifest.kind) for entry in manifest.shards)
    landmarks = manifest_landmarks(storage, url)
    verdicts: list[Verdict] = []
    for verdict in fan_out(_verified, storage, url, tasks, on_tick=tick, landmarks=landmarks):
        verdicts.append(verdict)
        progress = progress.after(kept=False, samples=verdict.samples, bad=len(verdict.faults))
    verdicts.sort(key=lambda verdict: verdict.shard)
    faults = tuple(fault for verdict in verdicts for fault in verdict.faults)
    return Verification(manifest, faults, time.monotonic() - began)


def _verified(storage: Storage, url: str, task: tuple[ShardEntry, bool, PixelKind]) -> Verdict:
    entry, deep, pixels = task
    return verify_shard(storage, url, entry, deep=deep, pixels=pixels)
