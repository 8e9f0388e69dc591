"""A folder that `engine.save_checkpoint` of DeepSpeed wrote, in whatever program: its weights, in fp32."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import CHUNK_BYTES, DEEPSPEED_FORMATS, CheckpointFile, Commit
from jobs.checkpoint.deepspeed_internals import MODEL_SUFFIX, OPTIMIZER_SUFFIX
from jobs.checkpoint.opened import opened
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.state_reading import read_zero_state
from jobs.errors import WeightsFileError
from jobs.run.directory import RunDirectory
from pipeline.access.urls import is_local
from pipeline.host.local_files import sha256_of
from pipeline.host.scratch import scratch_folder
from pipeline.store.storage import Storage

LATEST = "latest"
"""Names the newest of several checkpoints in a folder."""


def weights_in_folder(storage: Storage, folder: str) -> tuple[dict[str, Tensor], str]:
    """The state dict of a checkpoint of ZeRO 1, 2 or 3, and a digest of its files.

    Args:
        storage: Reaches it.
        folder: With the files of all ranks, or with `latest` and the folder that it names.

    Raises:
        WeightsFileError: There are no such files.
        CheckpointError: They are damaged, or of a kind that is not handled: offload, tensor parallelism, experts.
    """
    place = _with_files(storage, folder)
    names = _names(storage, place)
    with scratch_folder() as scratch:
        run = RunDirectory.of(Storage(), scratch, place.rstrip("/").rpartition("/")[2])
        files, digest = [], hashlib.sha256()
        for name in names:
            path = Path(checkpoint.file_url(run, 0, name))
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_local(place):
                path.symlink_to(Path(Storage.local_path(place)).absolute() / name)
            else:
                storage.download(Storage.join(place, name), path)
            files.append(checkpoint.checksummed(name, _chunks(path), CHUNK_BYTES))
            digest.update(f"{sha256_of(path)}  {name}\n".encode())
        opened_files, layout = opened(run, _commit(files))
        return dict(read_zero_state(opened_files, layout, {}, RankGroup()).weights), digest.hexdigest()


def _with_files(storage: Storage, folder: str) -> str:
    if LATEST in storage.list_names(folder):
        tag = storage.read(Storage.join(folder, LATEST)).decode(errors="replace").strip()
        if not tag or "/" in tag or tag in (".", ".."):
            rule, remedy = f"must name a folder beside it in `{LATEST}`", "give the folder with the ranks' files"
            raise WeightsFileError("FOLDER", rule, tag, remedy)
        return Storage.join(folder, tag)
    return folder


def _names(storage: Storage, folder: str) -> list[str]:
    names = sorted(name for name in storage.list_names(folder) if name.endswith((MODEL_SUFFIX, OPTIMIZER_SUFFIX)))
    if not names:
        rule, remedy = f"must hold files named *{OPTIMIZER_SUFFIX}", "give the folder that `save_checkpoint` wrote into"
        raise WeightsFileError("FOLDER", rule, folder, remedy)
    return names


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _commit(files: list[CheckpointFile]) -> Commit:
    """What a commit of ours would say of these files."""
    return Commit(
        step=0, epoch=0, world_size=0, zero_stage=0, precision="", recipe_digest="", dataset_digest="",
        order_version=0, seed=0, attempt=0, created_at_seconds=time.time(), milestone=False, counters={}, versions={},
        files=tuple(files), format_version=max(DEEPSPEED_FORMATS),
    )  # fmt: skip
