"""The identity of a process: what has to be kept with a pid for it to mean one process, and who can say that it ended.

A pid alone is ambiguous. It is used again; other containers on the same machine, even with the same host name, have
their own; and after a reboot all of them start over. Only a process in the same PID namespace of the same boot can
look, and only the start time tells a process from the next one with its pid. A process that cannot look knows nothing,
and has to go by time: by beats, or by a lock.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

PROC = Path("/proc")
_LARGEST_PID = 2**31


@dataclass(frozen=True)
class ProcessIdentity:
    """One process among all that ever ran anywhere."""

    pid: int
    namespace: str = ""
    """Its PID and time namespaces; empty where they are unknown, as on systems without /proc."""
    boot: str = ""
    """The kernel's random id of this boot."""
    started: int = -1
    """When it began, in clock ticks since boot: exact, while times of day move with the clock."""

    @classmethod
    def here(cls) -> ProcessIdentity:
        """This process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int, proc: Path = PROC) -> ProcessIdentity:
        """A process of this PID namespace.

        Args:
            pid: In this namespace.
            proc: Where procfs is mounted.
        """
        view = _View.here(proc)
        stat = _Stat.read(proc, pid) if view else None
        return cls(pid, view.namespace, view.boot, stat.started) if view and stat else cls(pid)

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> ProcessIdentity:
        """From fields as `dataclasses.asdict` gives them; what is missing or mistyped is unknown."""
        unknown = cls(0)
        known: dict[str, Any] = {field.name: content.get(field.name) for field in fields(cls)}
        sound = {name: value for name, value in known.items() if type(value) is type(getattr(unknown, name))}
        if not 0 < sound.get("pid", 0) < _LARGEST_PID:  # the system takes 0 and below for groups, or for all
            sound.pop("pid", None)
        return replace(unknown, **sound)

    def is_judged_here(self, proc: Path = PROC) -> bool:
        """Whether this process can say if that one lives: it is in the same PID namespace of the same boot."""
        view = _View.here(proc)
        return view is not None and (view.namespace, view.boot) == (self.namespace, self.boot) and self.started >= 0

    def has_ended(self, proc: Path = PROC) -> bool:
        """Whether it is known to have ended; False also where that cannot be known here."""
        if not self.is_judged_here(proc):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's, which may be hidden in /proc
            pass
        stat = _Stat.read(proc, self.pid)
        return stat is not None and (stat.started != self.started or stat.is_dead)

    def alive(self) -> bool:
        """Whether it is known to run; False also where that cannot be known here."""
        return self.process() is not None

    def process(self) -> psutil.Process | None:
        """The process, if it is of this namespace and has not ended; acting through it never hits another one."""
        if not self.is_judged_here() or self.has_ended():
            return None
        try:
            return psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True)
class _View:
    """The namespace and the boot from which this process sees others."""

    namespace: str
    boot: str

    @classmethod
    def here(cls, proc: Path) -> _View | None:
        try:
            boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
            # A pid means nothing in a /proc that shows another namespace, as after `unshare --pid` without a mount.
            if _own_pids(proc) != [os.getpid()]:
                return None
            spaces = [
                (proc / "self/ns" / name).stat() for name in ("pid", "time") if (proc / "self/ns" / name).exists()
            ]
        except (OSError, ValueError):
            return None
        if not spaces:
            return None
        return cls("-".join(f"{space.st_dev}:{space.st_ino}" for space in spaces), boot)


def _own_pids(proc: Path) -> list[int]:
    """This process's pids, from the namespace that /proc shows down to its own (proc(5), NSpid)."""
    lines = (proc / "self/status").read_text(errors="replace").splitlines()
    line = next((line for line in lines if line.startswith("NSpid:")), None)
    return [int(pid) for pid in line.split()[1:]] if line else [int((proc / "self").readlink().name)]


@dataclass(frozen=True)
class _Stat:
    """The part of /proc/PID/stat that is used (proc(5))."""

    started: int
    is_dead: bool
    """A zombie, which only waits for its parent, and has no thread left."""

    @classmethod
    def read(cls, proc: Path, pid: int) -> _Stat | None:
        try:
            text = (proc / str(pid) / "stat").read_text(errors="replace")
            rest = text[text.rindex(")") + 2 :].split()  # the name before may hold anything, blanks and brackets too
            return cls(started=int(rest[19]), is_dead=rest[0] in "ZX" and int(rest[17]) <= 1)
        except (OSError, ValueError, IndexError):
            return None
