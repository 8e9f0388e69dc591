"""One host of a network on this machine: namespaces of its own, held by a pipe."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from host_door import Door
from patience import done

HOME = "/srv"
"""The home folder on every host; Python installations may lie in the usual ones."""
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
_CLONE_NEWNET = 0x40000000
_INIT = "echo up; while read -r _; do :; done"


class Names(enum.Enum):
    """The way in which a host resolves names."""

    DEBIAN = "debian"
    """As Debian's and Ubuntu's installers leave it: its own name is 127.0.1.1, those of others are unknown."""
    DNS = "dns"
    """As with a name server: all hosts have names, short and long, and each is an address on the network."""


@dataclass(eq=False)
class Host:
    """One host, up until its network ends or its power is cut."""

    name: str
    address: str
    interface: str
    """The name of its one network interface but `lo`."""
    names: Names
    folder: Path
    """Of its files, as this process sees them: `home`, which is HOME on the host, and `tmp`, its /tmp."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of every command, beside PATH, HOME and the like."""
    _init: subprocess.Popen[bytes] = field(init=False)
    _first: psutil.Process = field(init=False)
    _dialer: ThreadPoolExecutor = field(init=False)
    _doors: list[Door] = field(default_factory=list)

    def boot(self) -> None:
        """Make its namespaces."""
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", _INIT]
        pipe = subprocess.PIPE
        self._init = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=_plain_environment(), cwd="/")
        assert self._init.stdout and self._init.stderr
        assert self._init.stdout.readline() == b"up\n", self._init.stderr.read().decode()
        self._first = inner(self._init)
        self._dialer = ThreadPoolExecutor(1, initializer=self._move_thread)

    @property
    def pid(self) -> int:
        """Pid of its process 1, as this process sees it."""
        return int(self._first.pid)

    @property
    def home(self) -> Path:
        """The folder that is HOME on the host."""
        return self.folder / "home"

    def start(self, *command: str, stdout: Any = subprocess.PIPE, **changes: str) -> subprocess.Popen[str]:
        """Start a command in HOME and return at once; `inner` is the process, the Popen's own is nsenter's.

        Args:
            command: Program and arguments.
            stdout: As Popen's; for standard error, too, unless it is a pipe.
            changes: Variables of this command's environment alone; an empty one is not set.
        """
        stderr = stdout if stdout != subprocess.PIPE else subprocess.PIPE
        every = {**_plain_environment(), **self.environment, **changes}
        return subprocess.Popen(
            [*self.enter("--net", "--uts", "--mount", "--pid"), "env", "-C", HOME, *command],
            env={name: value for name, value in every.items() if value},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )

    def serve(self, name: str, *command: str, **changes: str) -> subprocess.Popen[str]:
        """Start what runs until the host ends; what it prints is in `<name>.log` of the folder."""
        with (self.folder / f"{name}.log").open("a") as log:
            return self.start(*command, stdout=log, **changes)

    def run(self, script: str) -> str:
        """Run lines of shell to their end, as root; returns what they print."""
        return done(self.start("sh", "-ec", script), within_seconds=60)[0]

    def ip(self, *arguments: str) -> None:
        """Run `ip` in its network alone, with this process's files."""
        subprocess.run([*self.enter("--net"), "ip", *arguments], check=True, capture_output=True, timeout=30)

    def socket(self) -> socket.socket:
        """A TCP socket that is on this host, for this process."""
        return self._dialer.submit(socket.socket, socket.AF_INET, socket.SOCK_STREAM).result()

    def listens(self, port: int) -> bool:
        """Whether a server listens on a port of its address."""
        with self.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((self.address, port)) == 0

    def door(self, port: int) -> str:
        """URL by which this process reaches a server on the host, whatever was cut."""
        door = Door(self.socket, (self.address, port))
        self._doors.append(door)
        threading.Thread(target=door.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{door.server_address[1]}"

    def processes(self) -> list[psutil.Process]:
        """All that runs on it but its process 1."""
        here = Path(f"/proc/{self.pid}/ns/pid").readlink()
        return [process for process in psutil.process_iter() if process.pid != self.pid and _in(process.pid, here)]

    def matching(self, title: str) -> list[psutil.Process]:
        """Its processes whose command line holds `title`."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self, title: str, number: int = signal.SIGKILL) -> int:
        """Signal its processes whose command line holds `title`; returns how many."""
        found = self.matching(title)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return len(found)

    def end(self) -> None:
        """End all its processes and namespaces at once."""
        for door in self._doors:
            door.shutdown()
            door.server_close()
        self._doors.clear()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._first.kill()
        self._init.communicate()
        self._dialer.shutdown()

    def enter(self, *namespaces: str) -> list[str]:
        """The words before a command that have it run there, in some of the host's namespaces."""
        return ["nsenter", f"--target={self.pid}", *namespaces, "--"]

    def _move_thread(self) -> None:
        # Sockets stay in the network in which they were made, whichever thread uses them then.
        _set_namespace(f"/proc/{self.pid}/ns/net", _CLONE_NEWNET)


def inner(process: subprocess.Popen[Any]) -> psutil.Process:
    """The process on the host that a Popen of `Host.start` stands for: what is to have a signal."""
    parent = psutil.Process(process.pid)
    while not (children := parent.children()):
        assert process.poll() is None, "it has not ended yet"
        time.sleep(0.01)
    return children[0]


def _plain_environment() -> Mapping[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {"PATH": path, "HOME": HOME, "TMPDIR": "/tmp", "LANG": "C.UTF-8", "USER": "root"}


def _in(pid: int, namespace: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink() == namespace
    except OSError:
        return False


def _set_namespace(path: str, kind: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path) as file:  # noqa: PTH123  a descriptor is what is needed
        if libc.setns(file.fileno(), kind) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
