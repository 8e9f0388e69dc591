"""Writer of consolidated weights: tasks make the files part by part, in an order in which a kill costs little.

Nothing half-done looks complete: a file appears whole, its checksum once it was read back, and the index of several
files after the files. A journal beside each unfinished file (parted_journal) lists its written parts: an interrupted
consolidation resumes with the parts that the store still has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from jobs.checkpoint.checked_files import CheckedFiles
from jobs.cluster.fan_out import FanOut
from jobs.consolidation.copy_tasks import Done, HashFile, MakeFile, MakePart, Task, work
from jobs.consolidation.file_layout import INDEX_NAME, WeightFile, index_of
from jobs.consolidation.reads import planned
from jobs.consolidation.target import WrittenFile, recorded_sha256
from jobs.errors import CheckpointError
from pipeline.errors import LeaseHeldError, StorageError, UserError
from pipeline.store import parted_write
from pipeline.store.combined_crc import CRC32C, combined_crc
from pipeline.store.parted_journal import PartedJournal
from pipeline.store.parted_write import WrittenPart
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class ConsolidationProgress:
    """Progress of a consolidation, in parts and bytes."""

    done: int = 0
    total: int = 0
    bytes: int = 0
    kept: int = 0
    """Of the done: those that an earlier call had written."""


Show = Callable[[str, ConsolidationProgress], None]
"""Called with the name and progress of a stage, after each task and about every second."""


class WeightWriter:
    """One consolidation in progress.

    Owns: the answers of tasks, never weights.
    Concurrency: used by one thread, which holds a lease on the target.
    Failure: what is not finished is invisible. After bad input, what was written is removed; after any other fault,
        finished files and journals stay, and the next call resumes from them.
    """

    def __init__(
        self,
        source: CheckedFiles,
        url: str,
        files: Sequence[WeightFile],
        fan_out: FanOut,
        *,
        show: Show,
        check: Callable[[], None],
    ) -> None:
        """Note what is to be made; does no I/O.

        Args:
            source: The checkpoint.
            url: Of the file, or of the folder of several.
            files: The files to make.
            fan_out: Runs the tasks.
            show: Called with progress.
            check: Raises LeaseHeldError if the lease on the target was lost.
        """
        self.kept = 0
        """Files that already existed and were whole."""
        self.kept_bytes = 0
        """Bytes of parts that an earlier call had written into the others."""
        self._source, self._storage, self._url, self._fan_out = source, source.run.storage, url, fan_out
        self._files = {file.url: file for file in files}
        self._remaining = list(files)
        self._show, self._check = show, check
        self._journals: dict[str, PartedJournal] = {}
        self._made: dict[str, Sequence[WrittenPart]] = {}
        """The parts of each file that this call made, by URL."""
        self._to_hash: deque[HashFile] = deque()
        self._hashed: dict[str, WrittenFile] = {}
        self._progress = ConsolidationProgress(total=sum(file.part_count for file in files))

    def run(self, *, keep: bool) -> list[WrittenFile]:
        """Make all files.

        Args:
            keep: Whether to keep files of an earlier call that are whole; otherwise they are replaced.
        """
        try:
            if keep:
                self._keep_whole_ones()
            self._run("parts", self._tasks())
            self._run("read back", self._hashes())
            if len(self._files) > 1:
                files = list(self._files.values())
                self._storage.write(Storage.join(self._url, INDEX_NAME), index_of(files))
        except BaseException as error:
            self._clean(error)
            raise
        return [self._hashed[url] for url in self._files]

    def _keep_whole_ones(self) -> None:
        there = [file for file in self._remaining if self._is_begun(file)]
        tasks = [HashFile(file.url, file.bytes) for file in there if recorded_sha256(self._storage, file.url)]
        if not tasks:
            return
        for done in self._fan_out(work, self._storage, self._url, tasks, on_tick=self._tick("files there")):
            if done.sha256 == recorded_sha256(self._storage, done.url):
                file = self._files[done.url]
                self._hashed[done.url] = WrittenFile(done.url, done.bytes, done.sha256)
                self._remaining.remove(file)
                self.kept += 1
                self._note_kept(file.part_count)

    def _is_begun(self, file: WeightFile) -> bool:
        """Whether an earlier call made this file.

        Raises:
            CheckpointError: There is another file.
        """
        if not self._storage.exists(file.url):
            return False
        found = self._storage.read_range(file.url, 0, len(file.header))
        if found != file.header:
            raise CheckpointError(
                "target", "must not exist", file.url, "replace it with --force, or choose another --out"
            )
        return self._storage.size(file.url) == file.bytes

    def _tasks(self) -> Iterator[Task]:
        """Parts of the files, one file after another; between them, finished files are read back."""
        for file in self._remaining:
            self._storage.delete(f"{file.url}.sha256")
            if not parted_write.takes_parts(file.url):
                yield MakeFile(file.url, tuple(planned(part, self._source) for part in file.parts()))
                continue
            journal = self._resumed(file)
            there = set(journal.parts)
            for part in file.parts():
                yield from self._hashes()
                if part.number not in there:
                    yield MakePart(planned(part, self._source), journal.target)

    def _resumed(self, file: WeightFile) -> PartedJournal:
        """The journal of a file, with what an earlier call left."""
        journal = self._journals[file.url] = PartedJournal(self._storage, file.url, self._content(file))
        self.kept_bytes += journal.written_bytes
        self._note_kept(len(journal.parts))
        if len(journal.parts) == file.part_count:
            self._finish(file)
        return journal

    def _content(self, file: WeightFile) -> str:
        """Digest of all that determines the parts of a file."""
        sources = [(source.name, source.bytes, source.crc32c) for source in self._source.commit.files]
        origin = json.dumps([self._source.run.url, file.part_bytes, sources]).encode()
        return hashlib.sha256(file.header + origin).hexdigest()

    def _note_kept(self, parts: int) -> None:
        before = self._progress
        self._progress = replace(before, done=before.done + parts, kept=before.kept + parts)

    def _hashes(self) -> Iterator[Task]:
        while self._to_hash:
            yield self._to_hash.popleft()

    def _run(self, stage: str, tasks: Iterable[Task]) -> None:
        for done in self._fan_out(work, self._storage, self._url, tasks, on_tick=self._tick(stage)):
            if done.sha256:
                self._take_hash(done)
            else:
                self._take_parts(done)
            self._show(stage, self._progress)

    def _tick(self, stage: str) -> Callable[[], None]:
        def tick() -> None:
            self._check()
            self._show(stage, self._progress)

        return tick

    def _take_parts(self, done: Done) -> None:
        now, file = self._progress, self._files[done.url]
        self._progress = replace(now, done=now.done + len(done.parts), bytes=now.bytes + done.bytes)
        journal = self._journals.get(done.url)
        if journal is None:
            self._made[done.url] = done.parts
            self._to_hash.append(HashFile(file.url, file.bytes))
            return
        for part in done.parts:
            journal.add(part)
        if len(journal.parts) == file.part_count:
            self._finish(file)

    def _finish(self, file: WeightFile) -> None:
        """Make a file visible."""
        self._check()
        journal = self._journals[file.url]
        journal.finish()
        self._made[file.url] = list(journal.parts.values())
        self._to_hash.append(HashFile(file.url, file.bytes))

    def _take_hash(self, done: Done) -> None:
        sent = 0
        for part in sorted(self._made[done.url], key=lambda part: part.number):
            sent = combined_crc(sent, part.crc32c, part.bytes, CRC32C)
        journal = self._journals.pop(done.url, None)
        if done.crc32c != sent or done.bytes != self._files[done.url].bytes:
            self._storage.delete(done.url)
            if journal:
                journal.forget()
            remedy = "check the storage, then run the same command again"
            raise StorageError("storage", "must return what was written", done.url, remedy)
        name = done.url.rpartition("/")[2]
        self._storage.write(f"{done.url}.sha256", f"{done.sha256}  {name}\n".encode())
        self._hashed[done.url] = WrittenFile(done.url, done.bytes, done.sha256)
        if journal:
            journal.forget()

    def _clean(self, error: BaseException) -> None:
        """Remove what cannot be resumed; if another process has taken over, everything is left to it."""
        if isinstance(error, LeaseHeldError):
            return
        is_bad_input = isinstance(error, CheckpointError)
        with contextlib.suppress(OSError, UserError):
            for journal in self._journals.values():
                if is_bad_input or not journal.is_saved:
                    journal.abandon()
            for url in self._made if is_bad_input else ():
                self._storage.delete(f"{url}.sha256")
                self._storage.delete(url)
