"""Checkpoints, which are either complete or invisible.

Every rank uploads its part of the state as one file (jobs.checkpoint.rank_file); when all have, rank 0 writes the
commit object. It lists each file with its size and checksums, and says where in it the values of which tensor lie.
Without the commit object a checkpoint does not exist: a kill at any moment leaves at most files that nothing reads,
which are deleted after a later commit (jobs.checkpoint.retention).
Checkpoints are found by their commit objects, never by listing their files: object stores list deleted names for a
while.

Every driver and every attempt of its workers uploads into a folder of its own, and the commit object is written under a
condition. So two drivers of one run, one of which was thought dead, never mix their files, and the one with the newer
claim prevails.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import google_crc32c

from jobs.checkpoint.commit import CHUNK_BYTES, OTHERS, CheckpointFile, Commit
from jobs.errors import CheckpointError, DamagedCheckpointError, OvertakenError
from jobs.run.directory import RunDirectory
from pipeline.store.combined_crc import CRC32C, combined_crc
from pipeline.store.json_text import parsed_object
from pipeline.store.lease import current_lease

logger = logging.getLogger(__name__)

CLAIMS = "claims"
"""Folder of the run's claims (pipeline.store.lease): who drives it."""
COMMIT_NAME = re.compile(r"step-(\d{8,12})\.json")


def folder_name(step: int) -> str:
    """Name of the folder that holds the files of the checkpoint at `step`."""
    return f"step-{step:08d}"


def owner_name(claim: int, attempt: int) -> str:
    """Name of the folder, below that of a step, into which one attempt of one driver uploads."""
    return f"{claim:06d}-{attempt:04d}"


def file_url(run: RunDirectory, step: int, name: str) -> str:
    """Where a file of the checkpoint at `step` is."""
    return run.path("checkpoints", folder_name(step), name)


def commit_url(run: RunDirectory, step: int) -> str:
    """Where the commit object of `step` is."""
    return run.path("commits", f"{folder_name(step)}.json")


def upload(
    run: RunDirectory,
    step: int,
    path: Path,
    places: CheckpointFile,
    *,
    content: memoryview,
    owner: str = "",
    chunk_bytes: int = CHUNK_BYTES,
) -> CheckpointFile:
    """Upload a file into the checkpoint of `step`, which stays invisible.

    Args:
        run: Whose checkpoint it is.
        step: Of the checkpoint.
        path: Of the file here.
        places: Its name, and where values lie in it.
        content: What the file should hold; the checksums are of this, so that a disk which alters it is found out.
        owner: From `owner_name`: no other process uploads under it.
        chunk_bytes: Length of a chunk.
    """
    name = f"{owner}/{places.name}" if owner else places.name
    run.storage.upload(path, file_url(run, step, name))
    chunks = (bytes(content[start : start + chunk_bytes]) for start in range(0, len(content), chunk_bytes))
    sent = checksummed(name, chunks, chunk_bytes)
    return replace(sent, data_offset=places.data_offset, trained=places.trained, fixed=places.fixed)


def write_commit(run: RunDirectory, commit: Commit) -> None:
    """Make the checkpoint visible. Call once every rank has uploaded its files.

    An existing commit of this step was left by a predecessor, whose checkpoint was skipped or not seen. It is
    replaced, unless it was made under a newer claim or in a later attempt: a rank whose node was cut off may reach its
    commit long after the others have continued without it.

    Raises:
        OvertakenError: Another driver, or a later attempt, has taken over the run. Nothing was written.
    """
    ruler = current_lease(run.storage, run.path(CLAIMS))
    if ruler and ruler.number > commit.claim:
        raise _overtaken(commit, f"is driven by {ruler.text}")
    attempt = run.read_heartbeat().get("attempt", 0)
    if attempt > commit.attempt:
        raise _overtaken(commit, f"is at attempt {attempt}")
    url, data = commit_url(run, commit.step), json.dumps(asdict(commit)).encode()
    while not run.storage.create(url, data):
        try:
            found = run.storage.read(url)
        except FileNotFoundError:  # pruned meanwhile
            continue
        made, driver = _made_by(found)
        if made > (commit.claim, commit.attempt):
            raise _overtaken(commit, f"was committed at this step by {driver}")
        if run.storage.replace(url, data, found):
            return


def _made_by(data: bytes) -> tuple[tuple[int, int], str]:
    """Claim and attempt, and driver of a commit object; zeros for one that cannot be read, so that it is replaced."""
    try:
        commit = Commit.from_json(parsed_object(data))
    except ValueError:
        return (0, 0), ""
    return (commit.claim, commit.attempt), commit.driver


def _overtaken(commit: Commit, what: str) -> OvertakenError:
    remedy = "this driver was presumed dead and must end; the other's checkpoints count"
    rule = f"must not be committed to by two drivers or attempts, and {what}"
    return OvertakenError("run", rule, f"step {commit.step}", remedy)


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
        data = run.storage.read(commit_url(run, step))
    except FileNotFoundError:
        known = ", ".join(str(known) for known in committed_steps(run)) or "none yet"
        raise CheckpointError("step", "must be a committed checkpoint", step, f"committed: {known}") from None
    try:
        fields = parsed_object(data)
    except ValueError as error:
        rule = f"must be a JSON object ({error})"
        raise DamagedCheckpointError("commit", rule, f"step {step}", OTHERS) from None
    commit = Commit.from_json(fields)
    if commit.step != step:
        raise DamagedCheckpointError("commit", f"must be of the step in its name, {step}", commit.step, OTHERS)
    return commit


def latest_commit(run: RunDirectory) -> Commit | None:
    """The newest checkpoint; None before the first."""
    steps = committed_steps(run)
    return read_commit(run, steps[-1]) if steps else None


def prune(run: RunDirectory, keep: int, newest: int | None = None) -> list[int]:
    """Delete all but the `keep` newest checkpoints and the milestones; returns the steps deleted.

    Args:
        run: Whose checkpoints.
        keep: How many to keep.
        newest: The step that was just committed. Later ones are not counted and stay: they were skipped as damaged.
    """
    steps = [step for step in committed_steps(run) if newest is None or step <= newest]
    deleted = []
    for step in steps[:-keep]:
        try:
            commit = read_commit(run, step)
        except CheckpointError:  # it may be a milestone, and its files are unknown
            logger.warning("the checkpoint of step %d is not deleted: its commit object cannot be read", step)
            continue
        if not commit.milestone:
            delete(run, commit)
            deleted.append(step)
    return deleted


def delete(run: RunDirectory, commit: Commit) -> None:
    """Delete a checkpoint; its commit object first, so that a kill half-way leaves nothing that looks complete."""
    run.storage.delete(commit_url(run, commit.step))
    run.storage.delete_all(file_url(run, commit.step, file.name) for file in commit.files)


def checksummed(name: str, chunks: Iterable[bytes], chunk_bytes: int) -> CheckpointFile:
    """A file's size and checksums, from its bytes in order.

    Args:
        name: Of the file.
        chunks: Each of `chunk_bytes` bytes; the last may be shorter.
        chunk_bytes: Their length.
    """
    size, whole, each = 0, 0, []
    for chunk in chunks:
        checksum = google_crc32c.value(chunk)
        size, whole = size + len(chunk), combined_crc(whole, checksum, len(chunk), CRC32C)
        each.append(f"{checksum:08x}")
    return CheckpointFile(name, size, whole, chunk_bytes, "".join(each))
