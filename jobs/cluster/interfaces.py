"""The network interface over which the ranks of a node reach the others: that of the node's Ray address.

Left to themselves, gloo binds to what the host's own name resolves to, which is 127.0.1.1 on Debian and Ubuntu, and
NCCL to the first interface that it likes.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping, MutableMapping

UNREACHED_REMEDY = (
    "open all TCP ports between the nodes (one security group); where a node has several networks, set"
    " GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in its environment before `ray start`; `convmae doctor` tries it"
)
"""What to do where ranks do not reach each other."""


def interface_of(address: str, interfaces: Mapping[str, Iterable[str]]) -> str:
    """Name of the interface that has `address`; empty where none has.

    Args:
        address: IPv4 or IPv6.
        interfaces: Addresses by interface; an alias (`eth0:1`) is one of its own.
    """
    wanted = _unscoped(address)
    for name, addresses in interfaces.items():
        if wanted in map(_unscoped, addresses):
            return name
    return ""


def choose_interface(node_address: str, environ: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL use the interface of `node_address`, except where `environ` names one already.

    To be called before a process group is made.

    Args:
        node_address: By which Ray's other nodes know this one; a name is looked up.
        environ: Of this process.
    """
    name = interface_of(_looked_up(node_address), _interfaces())
    if not name:
        return
    environ.setdefault("GLOO_SOCKET_IFNAME", name)
    environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign every name that begins alike would do


def _interfaces() -> dict[str, list[str]]:
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [each.address for each in addresses if each.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }


def _unscoped(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Without the zone of a link-local address, which psutil appends."""
    return ipaddress.ip_address(address.partition("%")[0])


def _looked_up(address: str) -> str:
    found: str = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    return found
