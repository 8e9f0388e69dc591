"""Checkpoints that are either complete or invisible.

Every rank writes its native ZeRO files to local disk and uploads them; when all have, rank 0 writes the commit object,
which lists each file with its size and CRC32C. Without the commit object a checkpoint does not exist: a kill at any
moment leaves at most files that nobody looks at, and that the next checkpoint of the same step overwrites.
Checkpoints are found by their commit objects, never by listing their files: object stores list deleted names for a
while.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import psutil

from jobs.errors import CheckpointError, DamagedCheckpointError
from jobs.run_directory import RunDirectory

logger = logging.getLogger(__name__)

COMMIT_NAME = re.compile(r"step-(\d{8,})\.json")
FORMAT_VERSION = 1
_READ_BYTES = 1 << 22
_SCRATCH = "convmae-checkpoint-"


@dataclass(frozen=True)
class CheckpointFile:
    """One uploaded file."""

    name: str
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class Commit:
    """What makes a checkpoint exist, and all that is needed to resume from it."""

    step: int
    """Optimizer steps done; the next one to do."""
    epoch: int
    """Epochs finished."""
    world_size: int
    zero_stage: int
    precision: str
    recipe_digest: str
    dataset_digest: str
    order_version: int
    """Of the rules by which samples are dealt to steps; with digest, seed and step it is the state of the data."""
    seed: int
    attempt: int
    created_at_seconds: float
    """Unix time."""
    milestone: bool
    """Kept for ever."""
    counters: Mapping[str, float]
    """Run-level metrics that go on counting after a restart."""
    versions: Mapping[str, str]
    files: tuple[CheckpointFile, ...]
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def bytes(self) -> int:
        """Size of the checkpoint."""
        return sum(file.bytes for file in self.files)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Commit:
        """Read a commit object.

        Raises:
            CheckpointError: If it was written in another format.
        """
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            remedy = "use the version of convmae-pretrain that wrote it"
            raise CheckpointError("format_version", f"must be {FORMAT_VERSION}", version, remedy)
        files = tuple(CheckpointFile(**file) for file in fields["files"])
        return cls(**{**fields, "files": files})


def folder_name(step: int) -> str:
    """Name of the folder that holds the files of the checkpoint at `step`."""
    return f"step-{step:08d}"


def upload_files(run: RunDirectory, step: int, folder: Path) -> list[CheckpointFile]:
    """Upload every file of `folder` into the checkpoint of `step`; nothing of it is visible yet."""
    uploaded = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        run.storage.upload(path, run.path("checkpoints", folder_name(step), path.name))
        uploaded.append(CheckpointFile(path.name, path.stat().st_size, file_crc32c(path)))
    return uploaded


def write_commit(run: RunDirectory, commit: Commit) -> None:
    """Make the checkpoint visible. Call once every rank has uploaded its files."""
    data = json.dumps(asdict(commit), indent=1).encode()
    run.storage.write(run.path("commits", f"{folder_name(commit.step)}.json"), data)


def committed_steps(run: RunDirectory) -> list[int]:
    """Steps of the checkpoints that exist, ascending."""
    names = run.storage.list_names(run.path("commits"))
    return sorted(int(match[1]) for name in names if (match := COMMIT_NAME.fullmatch(name)))


def read_commit(run: RunDirectory, step: int) -> Commit:
    """The commit object of the checkpoint at `step`.

    Raises:
        CheckpointError: If there is none, or it is of another format.
        DamagedCheckpointError: If it is not what was written.
    """
    try:
        data = run.storage.read(run.path("commits", f"{folder_name(step)}.json"))
    except FileNotFoundError:
        known = ", ".join(str(known) for known in committed_steps(run)) or "none yet"
        raise CheckpointError("step", "must be a committed checkpoint", step, f"committed: {known}") from None
    try:
        fields = json.loads(data)
    except ValueError as error:
        rule, remedy = f"must be a JSON object ({error})", "`convmae checkpoints` shows which others are whole"
        raise DamagedCheckpointError("commit", rule, f"step {step}", remedy) from None
    return Commit.from_json(fields)


def latest_commit(run: RunDirectory) -> Commit | None:
    """The newest checkpoint; None before the first."""
    steps = committed_steps(run)
    return read_commit(run, steps[-1]) if steps else None


def download_files(run: RunDirectory, commit: Commit, folder: Path) -> None:
    """Fetch a checkpoint's files into `folder`, each checked against the commit.

    Raises:
        DamagedCheckpointError: If a file is missing, truncated or altered.
    """
    for file in commit.files:
        url = run.path("checkpoints", folder_name(commit.step), file.name)
        remedy = (
            f"delete {run.path('commits', folder_name(commit.step) + '.json')} to resume from the checkpoint before"
        )
        target = folder / file.name
        try:
            run.storage.download(url, target)
        except FileNotFoundError:
            raise DamagedCheckpointError("checkpoint", "must be whole", f"{url} is missing", remedy) from None
        if target.stat().st_size != file.bytes or file_crc32c(target) != file.crc32c:
            raise DamagedCheckpointError("checkpoint", "must be as it was written", f"{url} was altered", remedy)


def prune(run: RunDirectory, keep: int) -> list[int]:
    """Delete all but the `keep` newest checkpoints and the milestones; returns the steps deleted.

    The commit object goes first, so that a kill half-way leaves nothing that looks complete.
    """
    deleted = []
    for step in committed_steps(run)[:-keep]:
        commit = read_commit(run, step)
        if commit.milestone:
            continue
        run.storage.delete(run.path("commits", f"{folder_name(step)}.json"))
        for file in commit.files:
            run.storage.delete(run.path("checkpoints", folder_name(step), file.name))
        deleted.append(step)
    return deleted


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A local folder for one checkpoint's files, deleted with its context."""
    return tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-")


def sweep_scratch_folders() -> None:
    """Delete the scratch folders of processes that were killed on this machine."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        pid = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def file_crc32c(path: Path) -> int:
    """CRC32C of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            checksum = google_crc32c.extend(checksum, data)
    return checksum
