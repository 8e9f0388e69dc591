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
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from host import HOME, NAMESPACES, Host, Names

PROJECT = Path(__file__).resolve().parent.parent
CODE = ("pipeline", "model", "jobs", "infra")
DOMAIN = "cluster.internal"
_SUBNET = "10.77.0"
_NOWHERE = "02:00:00:00:00:99"
"""A hardware address that no host has."""
_RESOLV = "# no server is named, so that resolvers ask this host, which refuses at once\n"


def missing() -> str:
    """Why no hosts can be made here, in a line; empty where they can."""
    if os.geteuid() != 0:
        return "hosts need root"
    absent = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if absent:
        return f"hosts need {', '.join(absent)} (apt-get install iproute2 util-linux)"
    trial = "ip link add br0 type bridge && ip link add veth0 type veth peer name veth1 && mount -t tmpfs tmpfs /srv"
    made = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "sh", "-c", trial], capture_output=True, text=True, check=False
    )
    return f"namespaces cannot be made here: {made.stderr.strip()}" if made.returncode else ""


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
        subprocess.run([*host.enter("--uts", "--mount"), "sh", "-ec", _mounts(host, has_code)], check=True, timeout=60)
        self._plug_in(host)
        return host

    def cut(self, host: Host) -> None:
        """Pull its cable: nothing arrives any more, and nothing is reported."""
        self.switch.ip("link", "set", self._port(host), "down")

    def join(self, host: Host) -> None:
        """Put its cable back."""
        self.switch.ip("link", "set", self._port(host), "up")

    def separate(self, one: Host, other: Host) -> None:
        """Cut the link between two hosts alone; both hear all others."""
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
