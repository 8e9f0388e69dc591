"""From a checkpoint's ZeRO files to safetensors files that `ConvMAE.load_state_dict` takes, without holding the model.

Where each value lies, and where it goes, is known from a few kilobytes of each file. So every output file is cut into
parts, and tasks make one part each: ranged reads, perhaps another type, one part of an upload. What was read is
compared with the CRC-32 that the archives keep of every storage; bytes of those storages that no output needs are read
for that alone. The moments of the optimizer are not read. A finished file is read back for its SHA-256.

Nothing half-done looks complete: a file appears whole, the last one after all checks, and the index of several files
after the files. An interrupted consolidation keeps the files whose SHA-256 is right.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from jobs import checkpoint
from jobs.checkpoint import Commit
from jobs.errors import CheckpointError
from jobs.local_fan_out import fan_out_locally
from jobs.record_check import RecordCheck
from jobs.run_directory import RunDirectory
from jobs.weight_copy import Done, HashFile, MakeFile, MakePart, Task, work
from jobs.weight_files import DTYPES, FILE_NAME, INDEX_NAME, PART_BYTES, WeightFile, index_of, one_file, several_files
from jobs.zero_layout import ZeroFiles
from pipeline import parted_write
from pipeline.claim import claimed
from pipeline.crc_combine import CRC32C, combined
from pipeline.errors import StorageError, UserError
from pipeline.parted_write import PartedWrite, WrittenPart
from pipeline.storage import Storage, is_local

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 128 << 20
"""What the threads of one process may hold together."""
_NUMBERED = re.compile(r"(model-\d{5}-of-\d{5}\.safetensors)(\.sha256)?")
_COPIES, _COPIES_CONVERTING = 4, 8
"""Of a part, in a task's memory; what is read for a part of a narrower type is twice its size."""

IfExists = Literal["refuse", "keep", "replace"]


@dataclass(frozen=True)
class Progress:
    """How far a consolidation has come."""

    done: int = 0
    total: int = 0
    bytes: int = 0
    kept: int = 0
    """Of the done: those of files that an earlier run had finished."""


Show = Callable[[str, Progress], None]
"""Called with a stage's name and how far it has come, after each task and about every second."""


class FanOut(Protocol):
    """Runs tasks: `jobs.fan_out.fan_out` on a cluster, or threads of this process."""

    def __call__(
        self,
        work: Callable[[Storage, str, Task], Done],
        storage: Storage,
        url: str,
        tasks: Iterable[Task],
        *,
        on_tick: Callable[[], None],
    ) -> Iterator[Done]:
        """As `jobs.fan_out.fan_out`."""


@dataclass(frozen=True)
class WrittenFile:
    """One file of a consolidation."""

    url: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Consolidated:
    """A consolidated step."""

    url: str
    """Of the file, or of the folder that holds several."""
    step: int
    files: tuple[WrittenFile, ...]
    kept: int = 0
    """Files that were there already and whole."""
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Wanted:
    """What a consolidation shall make, checked.

    Raises:
        CheckpointError: Options that do not fit together.
    """

    dtype: str = "fp32"
    """`fp32`, `bf16` or `fp16`, of floating-point tensors."""
    shard_bytes: int | None = None
    """No file is larger; None: one file."""
    out: str = ""
    """URL of a `.safetensors` file or of a folder; empty: in the run directory."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CheckpointError("--dtype", "must be fp32, bf16 or fp16", self.dtype, "correct it")
        if self.shard_bytes is not None and self.out.endswith(".safetensors"):
            raise CheckpointError("--out", "must be a folder when --shard-bytes is given", self.out, "take a folder")

    def url(self, run: RunDirectory, step: int) -> str:
        """Of the one file, or of the folder of several."""
        if self.out:
            out = Storage.absolute(self.out).rstrip("/")
            is_file = self.shard_bytes is not None or out.endswith(".safetensors")
            return out if is_file else Storage.join(out, FILE_NAME)
        name = checkpoint.folder_name(step) + ("" if self.dtype == "fp32" else f"-{self.dtype}")
        return run.path("consolidated", name if self.shard_bytes is not None else f"{name}.safetensors")

    def mark(self, url: str) -> tuple[str, ...]:
        """What lies there when, and only when, all is finished; any of these."""
        if self.shard_bytes is None:
            return (f"{url}.sha256",)
        return (Storage.join(url, INDEX_NAME), Storage.join(url, f"{FILE_NAME}.sha256"))


def consolidated_url(run: RunDirectory, step: int) -> str:
    """Where the fp32 weights of `step` are."""
    return Wanted().url(run, step)


def is_consolidated(run: RunDirectory, step: int) -> bool:
    """Whether the fp32 weights of `step` are there."""
    return _is_finished(run.storage, Wanted(), consolidated_url(run, step))


def load_consolidated(run: RunDirectory, step: int) -> dict[str, Tensor]:
    """The fp32 tensors of a consolidated step by name; holds all of them."""
    from safetensors.torch import load

    return dict(load(run.storage.read(consolidated_url(run, step))))


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
    wanted: Wanted = Wanted(),
    *,
    if_exists: IfExists = "keep",
    fan_out: FanOut | None = None,
    part_bytes: int = PART_BYTES,
    on_progress: Show = lambda *_: None,
    on_wait: Callable[[str], None] = logger.warning,
) -> Consolidated:
    """Write the weights of a checkpoint, frozen parameters and buffers included, as safetensors.

    Each file has a `.sha256` beside it. The same call again goes on where it was cut off.

    Args:
        run: The run; it may be training.
        step: A committed step; None for the newest.
        wanted: Type, size and place of what is made.
        if_exists: What becomes of a finished result at that place: it is `refuse`d, `keep`: returned as it is, or
            `replace`d.
        fan_out: Where tasks run; None: in threads of this process.
        part_bytes: What a task moves, at least; a multiple of 8, and for S3 at least 5 MiB.
        on_progress: Called in this process.
        on_wait: Called with who seems to work at that place, when it takes time to see whether they live.

    Raises:
        CheckpointError: There is no such checkpoint, the result exists, or a value does not fit the type.
        DamagedCheckpointError: A file of it is missing or altered.
        ClaimedError: Another consolidation works at that place.
    """
    began = time.monotonic()
    commit = commit_of(run, step)
    url = wanted.url(run, commit.step)
    storage = run.storage
    if wanted.out:
        storage.check(url.rpartition("/")[0], write=True)
    if (found := _existing(storage, wanted, url, commit.step, if_exists)) is not None:
        return found
    claim_folder = f"{url.rpartition('/')[0]}/.{url.rpartition('/')[2]}.claims"
    with _swept(claim_folder), claimed(storage, claim_folder, "convmae consolidate", on_wait=on_wait) as claim:
        # Whoever held the claim before may have finished it.
        if (found := _existing(storage, wanted, url, commit.step, if_exists)) is not None:
            return found
        if if_exists == "replace":
            for mark in wanted.mark(url):
                storage.delete(mark)
        files = _planned(run, commit, wanted, url, part_bytes)
        copy = _Copy(
            storage,
            url,
            files,
            fan_out or in_threads(part_bytes, dtype=wanted.dtype),
            show=on_progress,
            check=claim.check,
        )
        written = copy.run(keep=if_exists != "replace")
        if if_exists == "replace" and wanted.shard_bytes is not None:
            _delete_others(storage, url, files)
    return Consolidated(url, commit.step, tuple(written), copy.kept, time.monotonic() - began)


def _existing(storage: Storage, wanted: Wanted, url: str, step: int, if_exists: IfExists) -> Consolidated | None:
    if if_exists == "replace" or not _is_finished(storage, wanted, url):
        return None
    if if_exists == "refuse":
        remedy = "it is there and whole; replace it with --force, or write to another place with --out"
        raise CheckpointError("target", "must not exist", url, remedy)
    if wanted.shard_bytes is not None:
        names = [name for name in storage.list_names(url) if name.endswith(".safetensors")]
        urls = [Storage.join(url, name) for name in names]
    else:
        urls = [url]
    files = tuple(WrittenFile(file, storage.size(file), _read_sha256(storage, file)) for file in urls)
    return Consolidated(url, step, files, len(files))


def _is_finished(storage: Storage, wanted: Wanted, url: str) -> bool:
    """Whether a result is there; a checksum whose file was deleted does not count."""
    if wanted.shard_bytes is None and not storage.exists(url):
        return False
    return any(storage.exists(mark) for mark in wanted.mark(url))


def _planned(run: RunDirectory, commit: Commit, wanted: Wanted, url: str, part_bytes: int) -> list[WeightFile]:
    tensors = ZeroFiles.read(run, commit, run.storage).weights()
    metadata, dtype = _metadata(run, commit, wanted), DTYPES[wanted.dtype]
    if wanted.shard_bytes is None:
        files = [one_file(url, tensors, metadata, dtype)]
    else:
        files = several_files(url, tensors, metadata, dtype, wanted.shard_bytes)
    return [replace(file, least_part_bytes=part_bytes) for file in files]


def _metadata(run: RunDirectory, commit: Commit, wanted: Wanted) -> dict[str, str]:
    # Read as it is written: `read_recipe` would import torch, which needs more memory than all else here.
    model = json.loads(run.storage.read(run.path("recipe.json")))["model"]
    git = commit.versions.get("git")
    return {
        "format": "pt",
        "run": run.name,
        "step": str(commit.step),
        "epoch": str(commit.epoch),
        "dtype": wanted.dtype,
        "recipe_digest": commit.recipe_digest,
        "dataset_digest": commit.dataset_digest,
        "model": json.dumps(model, sort_keys=True),
        "versions": json.dumps(dict(commit.versions), sort_keys=True),
        **({"git_commit": git} if git else {}),
    }


def _read_sha256(storage: Storage, url: str) -> str:
    try:
        return storage.read(f"{url}.sha256").decode().partition(" ")[0]
    except FileNotFoundError:
        return ""


def _delete_others(storage: Storage, folder: str, files: Sequence[WeightFile]) -> None:
    """Remove the files of a result that was replaced by one of other sizes."""
    mine = {file.url.rpartition("/")[2] for file in files}
    for name in storage.list_names(folder):
        if (match := _NUMBERED.fullmatch(name)) and match[1] not in mine:
            storage.delete(Storage.join(folder, name))


@contextlib.contextmanager
def _swept(folder: str) -> Iterator[None]:
    """Remove a work folder afterwards where folders exist by themselves; one that somebody uses again stays."""
    try:
        yield
    finally:
        if is_local(folder):
            with contextlib.suppress(OSError):
                Path(Storage.local_path(folder)).rmdir()


class _Copy:
    """One consolidation at work.

    Owns: what the tasks answered, never weights.
    Concurrency: used by one thread.
    Failure: what was begun and is not finished is invisible, and is swept away. Bad input takes its finished files with
        it; after a fault they stay, and the next call keeps them.
    """

    def __init__(
        self,
        storage: Storage,
        url: str,
        files: Sequence[WeightFile],
        fan_out: FanOut,
        *,
        show: Show,
        check: Callable[[], None],
    ) -> None:
        self.kept = 0
        self._storage, self._url, self._fan_out = storage, url, fan_out
        self._files = {file.url: file for file in files}
        self._todo = list(files)
        self._show, self._check = show, check
        self._targets: dict[str, PartedWrite] = {}
        self._parts: dict[str, list[WrittenPart]] = {}
        self._told: dict[str, list[tuple[int, int, int]]] = {}
        self._to_hash: deque[HashFile] = deque()
        self._records = RecordCheck(files)
        self._hashed: dict[str, WrittenFile] = {}
        self._progress = Progress(total=sum(file.part_count for file in files))

    def run(self, *, keep: bool) -> list[WrittenFile]:
        """Make all files; those of before are kept if they are whole."""
        try:
            if keep:
                self._keep_whole_ones()
            self._run("parts", self._tasks())
            self._run("checks", self._records.gaps())
            self._records.verify()
            for file in self._todo[-1:]:
                self._finish(file)
            self._run("read back", self._hashes())
            if len(self._files) > 1:
                files = list(self._files.values())
                self._storage.write(Storage.join(self._url, INDEX_NAME), index_of(files))
        except BaseException as error:
            self._clean(error)
            raise
        return [self._hashed[url] for url in self._files]

    def _keep_whole_ones(self) -> None:
        there = [file for file in self._todo if self._is_begun(file)]
        tasks = [HashFile(file.url, file.bytes) for file in there if _read_sha256(self._storage, file.url)]
        if not tasks:
            return
        for done in self._fan_out(work, self._storage, self._url, tasks, on_tick=self._tick("files there")):
            if done.sha256 == _read_sha256(self._storage, done.url):
                file = self._files[done.url]
                self._hashed[done.url] = WrittenFile(done.url, done.bytes, done.sha256)
                self._todo.remove(file)
                self.kept += 1
                count, before = file.part_count, self._progress
                self._progress = replace(before, done=before.done + count, kept=before.kept + count)

    def _is_begun(self, file: WeightFile) -> bool:
        """Whether an earlier call made this file.

        Raises:
            CheckpointError: Another file is there.
        """
        if not self._storage.exists(file.url):
            return False
        found = self._storage.read_range(file.url, 0, len(file.header))
        if found != file.header:
            raise CheckpointError(
                "target", "must not exist", file.url, "replace it with --force, or take another --out"
            )
        return self._storage.size(file.url) == file.bytes

    def _tasks(self) -> Iterator[Task]:
        """Parts of the files one after the other, and between them the reading back of those that are finished."""
        for file in self._todo:
            self._storage.delete(f"{file.url}.sha256")
            if not parted_write.takes_parts(file.url):
                yield MakeFile(file.url, tuple(file.parts()))
                continue
            target = self._targets[file.url] = parted_write.begin(self._storage, file.url)
            for part in file.parts():
                yield from self._hashes()
                yield MakePart(part, target)

    def _hashes(self) -> Iterator[Task]:
        while self._to_hash:
            yield self._to_hash.popleft()

    def _run(self, stage: str, tasks: Iterable[Task]) -> None:
        for done in self._fan_out(work, self._storage, self._url, tasks, on_tick=self._tick(stage)):
            self._records.add(done.checked)
            if done.sha256:
                self._take_hash(done)
            elif done.parts:
                self._take_parts(done)
            self._show(stage, self._progress)

    def _tick(self, stage: str) -> Callable[[], None]:
        def tick() -> None:
            self._check()
            self._show(stage, self._progress)

        return tick

    def _take_parts(self, done: Done) -> None:
        told = self._told.setdefault(done.url, [])
        told.extend(done.parts)
        if done.written:
            self._parts.setdefault(done.url, []).append(done.written)
        now = self._progress
        self._progress = replace(now, done=now.done + len(done.parts), bytes=now.bytes + done.bytes)
        file = self._files[done.url]
        if len(told) == file.part_count and file is not self._todo[-1]:
            self._finish(file)

    def _finish(self, file: WeightFile) -> None:
        """Make a file visible; the last one when all that was read has been checked."""
        self._check()
        target = self._targets.pop(file.url, None)
        if target:
            parted_write.finish(self._storage, target, self._parts[file.url])
        self._to_hash.append(HashFile(file.url, file.bytes))

    def _take_hash(self, done: Done) -> None:
        sent = 0
        for _, size, crc32c in sorted(self._told[done.url]):
            sent = combined(sent, crc32c, size, CRC32C)
        if done.crc32c != sent or done.bytes != self._files[done.url].bytes:
            self._storage.delete(done.url)
            remedy = "look after the storage, then run the same command again"
            raise StorageError("storage", "must give back what was written", done.url, remedy)
        name = done.url.rpartition("/")[2]
        self._storage.write(f"{done.url}.sha256", f"{done.sha256}  {name}\n".encode())
        self._hashed[done.url] = WrittenFile(done.url, done.bytes, done.sha256)

    def _clean(self, error: BaseException) -> None:
        with contextlib.suppress(OSError, UserError):
            for url in self._targets:
                parted_write.abandon_all(self._storage, url)
            if isinstance(error, CheckpointError):
                for file in self._todo:
                    if file.url in self._told and file.url not in self._targets:
                        self._storage.delete(f"{file.url}.sha256")
                        self._storage.delete(file.url)
