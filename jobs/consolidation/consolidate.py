"""Consolidation: a checkpoint becomes safetensors files for `ConvMAE.load_state_dict`, in little memory.

The commit says where each value lies, names and shapes say where it belongs. So every output file is cut into parts,
and each task makes one: ranged reads, possibly a conversion, one part of an upload. All reads are of whole chunks that
are compared with the commit's CRC32C. The moments of the optimizer are not read. A finished file is read back for its
SHA-256.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.opened import opened
from jobs.checkpoint.tensor_ranges import SourceTensor
from jobs.cluster.fan_out import FanOut, fan_out_locally
from jobs.consolidation.file_layout import DTYPES, PART_BYTES, WeightFile, one_file, several_files
from jobs.consolidation.target import ONE_FILE, ConsolidatedWeights, Target
from jobs.consolidation.writer import Show, WeightWriter
from jobs.errors import CheckpointError
from jobs.recipe.image_statistics import BITS_KEY, MEAN_KEY, STD_KEY, statistics_metadata
from jobs.run.directory import RunDirectory
from pipeline.access.urls import is_local
from pipeline.image.channels import PHOTOGRAPH_BITS
from pipeline.store.lease import hold_lease
from pipeline.store.storage import Storage

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 128 << 20
"""Most bytes that the threads of one process hold together."""
_NUMBERED = re.compile(r"(model-\d{5}-of-\d{5}\.safetensors)(\.sha256)?")
_COPIES, _COPIES_CONVERTING = 4, 8
"""Of a part, in a task's memory; for a narrower type twice its size is read."""

IfExists = Literal["refuse", "keep", "replace"]


def in_threads(part_bytes: int = PART_BYTES, most: int = 4, *, dtype: str = "fp32") -> FanOut:
    """Tasks in threads of this process; fewer where parts take more memory, so that it stays bounded."""
    copies = _COPIES if dtype == "fp32" else _COPIES_CONVERTING
    width = max(1, min(most, _BUFFER_BYTES // (copies * part_bytes)))
    return functools.partial(fan_out_locally, width=width)


def commit_of(run: RunDirectory, step: int | None) -> Commit:
    """The commit of a step; None for the newest.

    Raises:
        CheckpointError: There is none.
    """
    commit = checkpoint.latest_commit(run) if step is None else checkpoint.read_commit(run, step)
    if commit is None:
        remedy = "wait for the first one, or save more often (checkpoint_interval)"
        raise CheckpointError("run", "must have a committed checkpoint", run.name, remedy)
    return commit


def consolidate(
    run: RunDirectory,
    step: int | None = None,
    target: Target = ONE_FILE,
    *,
    if_exists: IfExists = "keep",
    fan_out: FanOut | None = None,
    part_bytes: int = PART_BYTES,
    on_progress: Show = lambda *_: None,
    on_wait: Callable[[str], None] = logger.warning,
) -> ConsolidatedWeights:
    """Write the weights of a checkpoint, frozen parameters and buffers included, as safetensors.

    Each file has a `.sha256` beside it. Repeating the call resumes where it was cut off.

    Args:
        run: The run; it may be training.
        step: A committed step; None for the newest.
        target: Type, size and place of the files.
        if_exists: What to do with finished files at that place: `refuse` them, `keep` them and return them as they are,
            or `replace` them.
        fan_out: Runs the tasks; None: threads of this process.
        part_bytes: Least size of what a task makes; a multiple of 8, and for S3 at least 5 MiB.
        on_progress: Called in this process.
        on_wait: Called with who seems to work at that place, when it takes time to find out whether they are alive.

    Raises:
        CheckpointError: There is no such checkpoint, the files exist, or a value does not fit the type.
        DamagedCheckpointError: A file of it is missing or altered.
        LeaseHeldError: Another consolidation works at that place.
    """
    began = time.monotonic()
    commit = commit_of(run, step)
    url = target.url(run, commit.step)
    storage = run.storage
    if target.out:
        storage.check(url.rpartition("/")[0], write=True, exclusive=True)
    if (found := _existing(storage, target, url, commit.step, if_exists)) is not None:
        return found
    lease_folder = f"{url.rpartition('/')[0]}/.{url.rpartition('/')[2]}.claims"
    with _swept(lease_folder), hold_lease(storage, lease_folder, "convmae consolidate", on_wait=on_wait) as lease:
        # The previous holder of the lease may have finished it.
        if (found := _existing(storage, target, url, commit.step, if_exists)) is not None:
            return found
        if if_exists == "replace":
            for mark in target.marks(url):
                storage.delete(mark)
        source, layout = opened(run, commit)
        files = _planned(layout.weights(), _metadata(run, commit, target), target, url, part_bytes)
        tasks = fan_out or in_threads(part_bytes, dtype=target.dtype)
        writer = WeightWriter(source, url, files, tasks, show=on_progress, check=lease.check)
        written = tuple(writer.run(keep=if_exists != "replace"))
        if if_exists == "replace" and target.shard_bytes is not None:
            _delete_others(storage, url, files)
    seconds = time.monotonic() - began
    return ConsolidatedWeights(url, commit.step, written, writer.kept, writer.kept_bytes, seconds)


def _existing(storage: Storage, target: Target, url: str, step: int, if_exists: IfExists) -> ConsolidatedWeights | None:
    if if_exists == "replace" or not target.is_finished(storage, url):
        return None
    if if_exists == "refuse":
        remedy = "it exists and is whole; replace it with --force, or write to another place with --out"
        raise CheckpointError("target", "must not exist", url, remedy)
    return target.found(storage, url, step)


def _planned(
    tensors: Sequence[SourceTensor], metadata: Mapping[str, str], target: Target, url: str, part_bytes: int
) -> list[WeightFile]:
    dtype = DTYPES[target.dtype]
    if target.shard_bytes is None:
        files = [one_file(url, tensors, metadata, dtype)]
    else:
        files = several_files(url, tensors, metadata, dtype, target.shard_bytes)
    return [replace(file, least_part_bytes=part_bytes) for file in files]


def _metadata(run: RunDirectory, commit: Commit, target: Target) -> dict[str, str]:
    # Read without `read_recipe`, which would import torch: more memory than all else here.
    fields = run.read_recipe_fields()
    model, part = fields["model"], fields.get("finetune")
    classifier = {"kind": part["kind"], "classes": part["classes"]} if part else None
    git = commit.versions.get("git")
    return {
        "format": "pt",
        "run": run.name,
        "step": str(commit.step),
        "epoch": str(commit.epoch),
        "dtype": target.dtype,
        "recipe_digest": commit.recipe_digest,
        "dataset_digest": commit.dataset_digest,
        "model": json.dumps(model, sort_keys=True),
        "versions": json.dumps(dict(commit.versions), sort_keys=True),
        **statistics_metadata(fields.get(MEAN_KEY, ()), fields.get(STD_KEY, ()), fields.get(BITS_KEY, PHOTOGRAPH_BITS)),
        **({"git_commit": git} if git else {}),
        **({"classifier": json.dumps(classifier, sort_keys=True)} if classifier else {}),
    }


def _delete_others(storage: Storage, folder: str, files: Sequence[WeightFile]) -> None:
    """Remove the files of consolidated weights that were replaced by files of other sizes."""
    mine = {file.url.rpartition("/")[2] for file in files}
    for name in storage.list_names(folder):
        if (match := _NUMBERED.fullmatch(name)) and match[1] not in mine:
            storage.delete(Storage.join(folder, name))


@contextlib.contextmanager
def _swept(folder: str) -> Iterator[None]:
    """Remove a work folder afterwards if folders exist by themselves, unless it is in use again."""
    try:
        yield
    finally:
        if is_local(folder):
            with contextlib.suppress(OSError):
                Path(Storage.local_path(folder)).rmdir()
