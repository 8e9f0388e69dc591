"""The holder of one node: parts of memory checkpoints, in a process that outlives the ranks beside it.

A rank's own part is not copied: the holder opens the memory file that the rank wrote, and the kernel keeps its memory
for whoever has it open. The part of a rank of another node is fetched from that node's holder, and compared with the
checksums that were made there.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from jobs.checkpoint.checkpoint import checksummed
from jobs.checkpoint.commit import CHUNK_BYTES, CheckpointFile
from jobs.errors import DamagedCheckpointError, HolderFullError
from pipeline.host.free_memory import free_memory_bytes
from pipeline.host.memory_file import MemoryFile

HOLDER_NAME = "convmae-memory"
"""Begins the names of all holders, as Ray's head knows them."""
SHARE_OF_FREE = 0.5
"""Of the memory that is free when a holder starts, it holds at most this."""
FETCH_BYTES = 32 * CHUNK_BYTES
"""Of one request to another holder."""
FETCHES = 2
"""Requests at once."""
HELD_FILE = "convmae-held-part"
"""Shown by tools that list what a process has open."""


def holder_name(run_url: str, node_id: str) -> str:
    """What Ray's head calls the holder of a run on a node."""
    return f"{HOLDER_NAME}:{node_id}:{run_url}"


@dataclass(frozen=True)
class Part:
    """Which part of which memory checkpoint; picklable."""

    generation: str
    """Folder of the checkpoint's step, and owner: what a checkpoint in the store would be called."""
    file: str
    """Of the rank."""


@dataclass(frozen=True)
class Holding:
    """What a holder has."""

    run_url: str
    pid: int
    bytes: int
    limit_bytes: int
    parts: int


class MemoryHolder:
    """The holder of one run on one node. A plain class: jobs.control.memory_holders makes an asynchronous actor of it.

    Owns: the memory of the parts, of the newest whole checkpoint and of the one that is being made.
    Concurrency: methods run on one event loop; checksums are computed in threads, so that reads are answered meanwhile.
    Failure: dies with its node, and with the run's driver; a new one holds nothing.
    Blocking: `hold` and `copy` for as long as the part takes.
    """

    def __init__(self, run_url: str, free_bytes: Callable[[], int] = free_memory_bytes) -> None:
        """Hold nothing yet.

        Args:
            run_url: Of the run.
            free_bytes: Memory that is left here.
        """
        self._run_url = run_url
        self._limit_bytes = int(SHARE_OF_FREE * free_bytes())
        self._parts: dict[Part, mmap.mmap] = {}

    async def hold(self, part: Part, path: str, places: CheckpointFile, keep: str) -> CheckpointFile:
        """Take over what a rank of this node has written.

        Args:
            part: What it is called.
            path: Of the rank's memory file.
            places: Where values lie in it.
            keep: The newest checkpoint that is whole; of all others but that of `part` everything is dropped.

        Returns:
            `places` with size and checksums.

        Raises:
            HolderFullError: There is no memory for it.
        """
        self._drop_all_but(keep, part.generation)
        memory = _opened(Path(path))
        self._add(part, memory)
        measured = await asyncio.to_thread(_measured, part.file, memory)
        return replace(measured, data_offset=places.data_offset, trained=places.trained, fixed=places.fixed)

    async def copy(self, part: Part, source: Any, sent: CheckpointFile, keep: str) -> CheckpointFile:
        """Copy a part that another holder has.

        Args:
            part: What it is called.
            source: Handle of the other holder.
            sent: What `hold` answered there.
            keep: As for `hold`.

        Raises:
            HolderFullError: There is no memory for it.
            DamagedCheckpointError: What came is not what was sent.
        """
        self._drop_all_but(keep, part.generation)
        room = MemoryFile(HELD_FILE, sent.bytes)
        # Counted before it is filled, so that all copies under way are.
        self._add(part, room.memory)
        at_once = asyncio.Semaphore(FETCHES)
        checksums = sent.chunk_checksums()

        async def fetch(offset: int) -> None:
            async with at_once:
                data = await source.read.remote(part, offset, min(FETCH_BYTES, sent.bytes - offset))
                first = offset // CHUNK_BYTES
                wanted = checksums[first : first + FETCH_BYTES // CHUNK_BYTES]
                await asyncio.to_thread(_place, room.memory, offset, data, wanted, part)

        try:
            await asyncio.gather(*(fetch(offset) for offset in range(0, sent.bytes, FETCH_BYTES)))
        except BaseException:
            self._parts.pop(part, None)
            raise
        return sent

    async def read(self, part: Part, offset: int, length: int) -> NDArray[np.uint8]:
        """(length,) bytes of a part; fewer where it ends before.

        Raises:
            FileNotFoundError: It is not held here.
        """
        memory = self._parts.get(part)
        if memory is None:
            raise FileNotFoundError(f"{part.generation}/{part.file} in memory")
        return np.frombuffer(memory, np.uint8)[offset : offset + length]

    async def holding(self) -> Holding:
        """What is held here."""
        return Holding(self._run_url, os.getpid(), self._bytes(), self._limit_bytes, len(self._parts))

    def _add(self, part: Part, memory: mmap.mmap) -> None:
        if self._bytes() + len(memory) > self._limit_bytes:
            rule = f"must hold at most {self._limit_bytes:,} bytes, {SHARE_OF_FREE:.0%} of what was free at the start"
            asked = f"{self._bytes() + len(memory):,}"
            remedy = "train on more nodes, or with memory_checkpoint_every_steps=0"
            raise HolderFullError("memory checkpoints of a node", rule, asked, remedy)
        self._parts[part] = memory

    def _bytes(self) -> int:
        return sum(map(len, self._parts.values()))

    def _drop_all_but(self, *generations: str) -> None:
        self._parts = {part: memory for part, memory in self._parts.items() if part.generation in generations}


def _opened(path: Path) -> mmap.mmap:
    """The memory of another process's memory file, which stays when that process ends."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)


def _measured(name: str, memory: mmap.mmap) -> CheckpointFile:
    """A part's size and checksums."""
    content = memoryview(memory)
    chunks = (bytes(content[start : start + CHUNK_BYTES]) for start in range(0, len(content), CHUNK_BYTES))
    return checksummed(name, chunks, CHUNK_BYTES)


def _place(room: mmap.mmap, offset: int, data: NDArray[np.uint8], checksums: list[int], part: Part) -> None:
    """Copy what came to where it belongs, if it is what was sent."""
    content = data.tobytes()
    for number, checksum in enumerate(checksums):
        start = number * CHUNK_BYTES
        if google_crc32c.value(content[start : start + CHUNK_BYTES]) != checksum:
            rule = f"must arrive as it was sent, and differs from byte {offset + start} on"
            raise DamagedCheckpointError("memory checkpoint", rule, part.file, "the next one replaces it")
    room[offset : offset + len(content)] = content
