"""Faults that loader processes meet: importable, so that they can be pickled, and looked up in the processes."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.errors import UnreachableError
from pipeline.image.augment import Crop, Draws, RandomCrops
from pipeline.store.storage import Storage

SERVER = "pipeline.load.processes.fork_server"


@dataclass(frozen=True)
class HangingStorage(Storage):
    """A store that never answers for one tar."""

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        if url.endswith("shard-000002.tar"):
            time.sleep(600)
        return super().read_range(url, offset, length, etag)


@dataclass(frozen=True)
class UnreachableStorage(Storage):
    """A store that is gone, after all retries."""

    def read_range(self, url: str, *_: object) -> bytes:
        raise UnreachableError("storage", "must answer", url, "start it")


@dataclass(frozen=True)
class AskingStorage(Storage):
    """A store whose client asks for newer keys, and says which it got."""

    def read_range(self, url: str, *_: object) -> bytes:
        keys = self.renewal() if self.renewal else None
        raise UnreachableError("storage", "must answer", url, f"keys are {keys.key if keys else None}")


@dataclass(frozen=True)
class SlowStorage(Storage):
    """A store that takes its time."""

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        time.sleep(0.02)
        return super().read_range(url, offset, length, etag)


@dataclass(frozen=True)
class FatalImages(RandomCrops):
    """Ends the process as a crash in a decoder does, for images of one size."""

    size: tuple[int, int] = (0, 0)
    """Height and width."""
    deaths: str = ""
    """A folder that gets a file for each."""

    def crop(self, draws: Draws, height: int, width: int) -> Crop:
        if (height, width) == self.size:
            (Path(self.deaths) / f"{time.monotonic_ns()}-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().crop(draws, height, width)


@dataclass(frozen=True)
class LockedImages(RandomCrops):
    """Never returns for images of one size, and never gives the interpreter's lock away."""

    size: tuple[int, int] = (0, 0)

    def crop(self, draws: Draws, height: int, width: int) -> Crop:
        if (height, width) == self.size:
            re.match(r"(a+)+$", "a" * 60 + "b")
        return super().crop(draws, height, width)


@dataclass(frozen=True)
class FatalDraws(RandomCrops):
    """Ends each process before it has made anything."""

    def draws(self, *_: object) -> Draws:
        os._exit(7)


def servers(of: int | None = None) -> list[psutil.Process]:
    """Fork servers of a process; of this one if none is named."""
    return [child for child in psutil.Process(of).children() if SERVER in " ".join(_command(child))]


def loader_processes(of: int | None = None) -> list[psutil.Process]:
    """Loader processes of a process that are alive."""
    found = [child for server in servers(of) for child in server.children()]
    return [child for child in found if _is_alive(child)]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
