"""Blocks on the node's own disk: what was read once from the object store is read from there the next time.

One file a block, its bytes as they lie in the tar; only the index says whether they are right, so a file that was
damaged, cut short or half written is found by the CRC32C of its images, like a damaged object. Files are put in
place by a rename. The only lock is a flock, which the kernel drops with the process that holds it; the sum of bytes
that it guards may be off after a kill, and is counted again before anything is evicted.

    <folder>/lock, <folder>/used              flock, and bytes used by all datasets
    <folder>/<digest>/<shard>-<start>-<bytes> a block; its mtime is when it was last used

Trade-off: the least recently used block goes first, but not one that this process used in its last two epochs. An epoch
reads every block once, in another order each time; plain LRU would throw out what the next epoch needs, and a cache
for half of the lanes would serve an eighth of the reads instead of half.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

ORPHAN_SECONDS = 600.0
"""Age at which a half-written file belongs to a process that died."""
SPARE_RATIO = 1 / 64
"""Of the budget, freed beyond what is needed, so that counting again stays rare."""
RECOUNT_SECONDS = 30.0
"""Least time between two counts that found nothing to evict."""
LOCK_SECONDS = 5.0
"""How long a block waits for the flock before it is not stored; a stopped process may hold it permanently."""
_USED_DIGITS = 20


@dataclass(frozen=True)
class CachePlace:
    """The folder in which a node keeps its blocks, and its budget."""

    folder: str
    limit_bytes: int


class BlockCache:
    """The blocks of one dataset in a folder that several processes, runs and datasets may share.

    Owns: nothing in memory but a few counters.
    Concurrency: safe to call from several threads and processes.
    Failure: a disk that is full or gone stops the storing of blocks, with one warning; nothing is raised.
    Blocking: local disk; put() also waits for the flock.
    """

    def __init__(
        self,
        place: CachePlace,
        digest: str,
        clock: Callable[[], float] = time.time,
        *,
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        """Open the folder, and count what it holds.

        Args:
            place: Folder and budget.
            digest: The dataset's; other datasets' blocks share the budget alone.
            clock: Unix time.
            lock_seconds: How long a block waits for the flock.
        """
        self.evictions = 0
        self.storing = True
        """Whether blocks are still being stored; False once the disk failed."""
        self._root = Path(place.folder)
        self._folder = self._root / digest[:32]
        self._limit_bytes = place.limit_bytes
        self._clock = clock
        self._lock_seconds = lock_seconds
        self._opened_at = clock()
        self._epochs_began = (0.0, 0.0)
        self._full_until = 0.0
        self._lock = threading.Lock()
        with self._or_off():
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as held:
                if held:
                    self._make_room(0)

    @property
    def used_bytes(self) -> int:
        """Over all datasets in the folder, as counted by all processes together."""
        return self._noted() or 0

    @property
    def full(self) -> bool:
        """Whether put() would store nothing now."""
        return not self.storing or self._clock() < self._full_until

    def begin_epoch(self) -> None:
        """Begin an epoch: this process will not evict what was used since the epoch before it began."""
        self._epochs_began = (self._epochs_began[1], self._clock())

    def holds(self, name: str) -> bool:
        """Whether the block is there."""
        return (self._folder / name).exists()

    def get(self, name: str, start: int, length: int) -> bytes | None:
        """Part of a block, unchecked; None where it is not there. Fewer bytes where the file is cut short."""
        try:
            with (self._folder / name).open("rb") as file:
                data = os.pread(file.fileno(), length, start)
                now = self._clock()
                os.utime(file.fileno(), (now, now))
        except OSError:
            return None
        return data

    def drop(self, name: str) -> None:
        """Forget a block that turned out to be damaged."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def put(self, name: str, data: bytes) -> None:
        """Store a block if there is room for it."""
        if self.full:
            return
        path = self._folder / name
        with self._or_off():
            with self._locked() as held:
                if not held or path.exists() or not self._make_room(len(data)):
                    return
                self._note_used(self.used_bytes + len(data))
            temporary = path.with_name(f".{name}.{secrets.token_hex(8)}")
            try:
                temporary.write_bytes(data)
                now = self._clock()
                os.utime(temporary, (now, now))
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _make_room(self, wanted_bytes: int) -> bool:
        """Evict until `wanted_bytes` fit; False if what may go is not enough. Call with the flock held."""
        noted = self._noted()
        if wanted_bytes and noted is not None and noted + wanted_bytes <= self._limit_bytes:
            return True
        files = self._count()
        used = sum(size for _, size, _ in files)
        target = self._limit_bytes - wanted_bytes
        if used > target:
            target -= int(self._limit_bytes * SPARE_RATIO)
            for last_used, size, path in sorted(files):
                if used <= target:
                    break
                # A lowered budget is kept to in any case.
                if self._is_needed(path, last_used) and used <= self._limit_bytes:
                    continue
                path.unlink(missing_ok=True)
                used -= size
                self.evictions += 1
        self._note_used(used)
        fits = used + wanted_bytes <= self._limit_bytes
        if not fits:
            self._full_until = self._clock() + RECOUNT_SECONDS
        return fits

    def _is_needed(self, path: Path, last_used: float) -> bool:
        own = path.parent == self._folder
        return last_used >= (self._epochs_began[0] if own else max(self._epochs_began[0], self._opened_at))

    def _count(self) -> list[tuple[float, int, Path]]:
        """Last use, bytes and path of every block in the folder; removes what dead processes left half written."""
        files = []
        for folder in self._root.iterdir():
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name.startswith(".") and self._clock() - status.st_mtime > ORPHAN_SECONDS:
                        Path(entry.path).unlink()
                    else:
                        files.append((status.st_mtime, status.st_size, Path(entry.path)))
        return files

    def _noted(self) -> int | None:
        try:
            return int((self._root / "used").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def _note_used(self, used_bytes: int) -> None:
        handle = os.open(self._root / "used", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(handle, f"{used_bytes:{_USED_DIGITS}d}".encode(), 0)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the flock; False if another process kept it for too long."""
        deadline = time.monotonic() + self._lock_seconds
        with (self._root / "lock").open("ab") as file:
            held = False
            while not held and time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = True
                except BlockingIOError:
                    time.sleep(0.005)
            yield held

    @contextlib.contextmanager
    def _or_off(self) -> Iterator[None]:
        """Let a disk that fails end the storing of blocks and nothing else."""
        try:
            yield
        except OSError as error:
            with self._lock:
                if self.storing:
                    logger.warning(
                        "%s: no more blocks are stored there (%s: %s); the run continues without",
                        self._root,
                        type(error).__name__,
                        error,
                    )
                self.storing = False
