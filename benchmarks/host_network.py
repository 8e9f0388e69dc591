"""Hosts on one machine: each has a network, a name, mounts and processes of its own, and a cable to one switch.

A host is a process 1 in new network, UTS, mount and PID namespaces. It reads a pipe whose other end this process holds,
so that with this process, however it ends, every host ends, and with its process 1 the kernel ends all that ran on it.
The switch is a bridge in one more network namespace: nothing in the machine's own interfaces and routes changes, no
namespace has a name, and any number of networks can be up at once. Needs root, and iproute2 and util-linux.

    with host_network(folder) as network:
        web = network.add("web", interface="eth0")
        laptop = network.add("laptop", interface="wlp2s0", names=Names.DEBIAN)
        server = web.start("python3", "-m", "http.server")     # a Popen; ended with the host
        done(laptop.start("curl", f"http://{web.address}:8000"))
        url = web.door(8000)                                    # http://127.0.0.1:PORT for this process
        network.cut(web)                                        # silence: no reset, no refusal
        network.join(web)
        network.separate(web, laptop)                           # they alone do not hear each other; reunite() ends it
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parent.parent
CODE = ("pipeline", "model", "jobs", "infra")
HOME = "/srv"
"""Of whoever works on a host; Python installations may lie in the usual ones."""
DOMAIN = "cluster.internal"
_SUBNET = "10.77.0"
_NOWHERE = "02:00:00:00:00:99"
"""A hardware address that no host has."""
_CLONE_NEWNET = 0x40000000
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")
_RESOLV = "# no server is named, so that resolvers ask this host, which refuses at once\n"
_INIT = "echo up; while read -r _; do :; done"


class Names(enum.Enum):
    """What a host makes of names."""

    DEBIAN = "debian"
    """As Debian's and Ubuntu's installers leave it: its own name is 127.0.1.1, those of others are unknown."""
    DNS = "dns"
    """As with a name server: all hosts have names, short and long, and each is an address on the network."""


def missing() -> str:
    """Why no hosts can be made here, in a line; empty where they can."""
    if os.geteuid() != 0:
        return "hosts need root"
    absent = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if absent:
        return f"hosts need {', '.join(absent)} (apt-get install iproute2 util-linux)"
    trial = "ip link add br0 type bridge && ip link add veth0 type veth peer name veth1 && mount -t tmpfs tmpfs /srv"
    made = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "sh", "-c", trial], capture_output=True, text=True, check=False
    )
    return f"namespaces cannot be made here: {made.stderr.strip()}" if made.returncode else ""


def done(process: subprocess.Popen[str], code: int = 0, within_seconds: float = 300) -> tuple[str, str]:
    """Wait for a command's end; returns standard output and standard error.

    Raises:
        AssertionError: It ended with another code, or not in time; says what it printed.
    """
    late = False
    try:
        out, err = process.communicate(timeout=within_seconds)
    except subprocess.TimeoutExpired:
        late = True
        end(process)
        out, err = process.communicate()
    ended = f"was at work after {within_seconds} s" if late else f"ended with {process.returncode}"
    assert not late and process.returncode == code, f"{shlex.join(map(str, process.args))} {ended}\n{out}\n{err}"
    return out, err


def inner(process: subprocess.Popen[Any]) -> psutil.Process:
    """The process on the host that a Popen of `Host.start` stands for: what is to have a signal."""
    parent = psutil.Process(process.pid)
    while not (children := parent.children()):
        assert process.poll() is None, "it has not ended yet"
        time.sleep(0.01)
    return children[0]


def end(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a command and its children."""
    with contextlib.suppress(psutil.NoSuchProcess, AssertionError):
        command = inner(process)
        for member in [*command.children(recursive=True), command]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


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
    _doors: list[_Door] = field(default_factory=list)

    def boot(self) -> None:
        """Make its namespaces."""
        command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", _INIT]
        pipe = subprocess.PIPE
        self._init = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=_plain_environment(), cwd="/")
        assert self._init.stdout and self._init.stderr
        assert self._init.stdout.readline() == b"up\n", self._init.stderr.read().decode()
        self._first = inner(self._init)
        self._dialer = ThreadPoolExecutor(1, initializer=self._move_thread)

    @property
    def pid(self) -> int:
        """Of its process 1, as this process sees it."""
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
            [*self._enter("--net", "--uts", "--mount", "--pid"), "env", "-C", HOME, *command],
            env={name: value for name, value in every.items() if value},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )

    def serve(self, name: str, *command: str, **changes: str) -> subprocess.Popen[str]:
        """Start what goes on until the host ends; what it prints is in `<name>.log` of the folder."""
        with (self.folder / f"{name}.log").open("a") as log:
            return self.start(*command, stdout=log, **changes)

    def run(self, script: str) -> str:
        """Run lines of shell to their end, as root; returns what they print."""
        return done(self.start("sh", "-ec", script), within_seconds=60)[0]

    def ip(self, *arguments: str) -> None:
        """Run `ip` in its network alone, with this process's files."""
        subprocess.run([*self._enter("--net"), "ip", *arguments], check=True, capture_output=True, timeout=30)

    def socket(self) -> socket.socket:
        """A TCP socket that is on this host, for this process."""
        return self._dialer.submit(socket.socket, socket.AF_INET, socket.SOCK_STREAM).result()

    def listens(self, port: int) -> bool:
        """Whether a server is at a port of its address."""
        with self.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((self.address, port)) == 0

    def door(self, port: int) -> str:
        """URL by which this process reaches a server on the host, whatever was cut."""
        door = _Door(self, port)
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

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *namespaces, "--"]

    def _move_thread(self) -> None:
        # Sockets stay in the network in which they were made, whichever thread uses them then.
        _set_namespace(f"/proc/{self.pid}/ns/net", _CLONE_NEWNET)


@dataclass(eq=False)
class Network:
    """The switch and its hosts."""

    folder: Path
    switch: Host
    hosts: list[Host] = field(default_factory=list)
    _added: int = 0

    def add(self, name: str, *, interface: str, names: Names = Names.DNS, has_code: bool = True) -> Host:
        """Boot a host, and plug it in.

        Args:
            name: Its host name.
            interface: Of its network interface.
            names: How it resolves names.
            has_code: False: the project's packages are not on it, as on nodes that have the dependencies alone.
        """
        self._added += 1
        host = Host(name, f"{_SUBNET}.{9 + self._added}", interface, names, self.folder / name)
        (host.folder / "home").mkdir(parents=True)
        (host.folder / "tmp").mkdir(mode=0o1777)
        (host.folder / "resolv.conf").write_text(_RESOLV)
        host.boot()
        self.hosts.append(host)
        for each in self.hosts:
            self._write_names(each)
        subprocess.run([*host._enter("--uts", "--mount"), "sh", "-ec", _mounts(host, has_code)], check=True, timeout=60)
        self._plug_in(host)
        return host

    def cut(self, host: Host) -> None:
        """Pull its cable: nothing arrives any more, and nobody is told."""
        self.switch.ip("link", "set", self._port(host), "down")

    def join(self, host: Host) -> None:
        """Put its cable back."""
        self.switch.ip("link", "set", self._port(host), "up")

    def separate(self, one: Host, other: Host) -> None:
        """Let two hosts send to each other in vain; both hear all others."""
        for sender, receiver in ((one, other), (other, one)):
            neighbour = ("lladdr", _NOWHERE, "dev", sender.interface, "nud", "permanent")
            sender.ip("neigh", "replace", receiver.address, *neighbour)

    def reunite(self, one: Host, other: Host) -> None:
        """End `separate`."""
        for sender, receiver in ((one, other), (other, one)):
            sender.ip("neigh", "del", receiver.address, "dev", sender.interface)

    @contextlib.contextmanager
    def without(self, host: Host, *, seconds: float) -> Iterator[None]:
        """Cut a host for as long as the context and at least so many seconds."""
        until = time.monotonic() + seconds
        self.cut(host)
        try:
            yield
            time.sleep(max(0.0, until - time.monotonic()))
        finally:
            self.join(host)

    def power_off(self, host: Host) -> None:
        """Take its power: silent, and all its processes are gone; it does not come back."""
        self.cut(host)
        self.hosts.remove(host)
        host.end()

    def end(self) -> None:
        """End all hosts, then the switch."""
        for host in [*reversed(self.hosts), self.switch]:
            host.end()

    def _plug_in(self, host: Host) -> None:
        port = self._port(host)
        peer = ("peer", "name", host.interface, "netns", str(host.pid))
        self.switch.ip("link", "add", port, "type", "veth", *peer)
        self.switch.ip("link", "set", port, "master", "br0", "up")
        host.ip("link", "set", "lo", "up")
        host.ip("address", "add", f"{host.address}/24", "dev", host.interface)
        host.ip("link", "set", host.interface, "up")
        host.ip("route", "add", "default", "via", f"{_SUBNET}.1")

    @staticmethod
    def _port(host: Host) -> str:
        return f"p{host.address.rpartition('.')[2]}"

    def _write_names(self, host: Host) -> None:
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
        if host.names is Names.DEBIAN:
            lines.append(f"127.0.1.1 {host.name}")
        else:
            lines += [f"{other.address} {other.name}.{DOMAIN} {other.name}" for other in self.hosts]
        # In place: the file is mounted over another, which follows the file and not its name.
        (host.folder / "hosts").write_text("\n".join([*lines, ""]))


@contextlib.contextmanager
def host_network(folder: Path) -> Iterator[Network]:
    """A switch without hosts; all ends with the context.

    Args:
        folder: Empty; for files of the hosts.
    """
    switch = Host("switch", f"{_SUBNET}.1", "br0", Names.DNS, folder)
    switch.boot()
    network = Network(folder, switch)
    try:
        switch.ip("link", "add", "br0", "type", "bridge")
        switch.ip("address", "add", f"{switch.address}/24", "dev", "br0")
        switch.ip("link", "set", "br0", "up")
        yield network
    finally:
        network.end()


class _Door(socketserver.ThreadingTCPServer):
    """Listens on this process's loopback address, and connects on a host."""

    daemon_threads = True

    def __init__(self, host: Host, port: int) -> None:
        self.dial: Callable[[], socket.socket] = host.socket
        self.target = (host.address, port)
        super().__init__(("127.0.0.1", 0), _Passage)


class _Passage(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Door)
        with contextlib.suppress(OSError, RuntimeError), self.server.dial() as there:
            there.connect(self.server.target)
            back = threading.Thread(target=_pump, args=(there, self.request), daemon=True)
            back.start()
            _pump(self.request, there)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


def _mounts(host: Host, has_code: bool) -> str:
    """Shell lines that give a host its own files; run with its name and mounts, and this process's view of folders."""
    own = host.folder.absolute()
    lines = [f"hostname {host.name}", f"mount --bind {own}/home {HOME}", "mount -t tmpfs -o size=2g tmpfs /dev/shm"]
    lines += [f"if [ -e /etc/{name} ]; then mount --bind {own}/{name} /etc/{name}; fi" for name in _ETC]
    if not has_code:
        lines += [f"mount -t tmpfs -o ro,size=4k tmpfs {PROJECT / name}" for name in CODE]
    # Its /tmp comes last, since it hides this process's, in which folders named above may lie.
    for path in _needed(PROJECT, Path(sys.prefix), Path(sys.base_prefix)):
        inside = own / "tmp" / path.relative_to("/tmp")
        lines.append(f"mkdir -p {inside}; mount --rbind {path} {inside}")
    lines.append(f"mount --rbind {own}/tmp /tmp")
    return "\n".join(lines)


_ETC: Sequence[str] = ("hosts", "resolv.conf")


def _needed(*paths: Path) -> list[Path]:
    return [path for path in dict.fromkeys(paths) if path.is_relative_to("/tmp")]


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
