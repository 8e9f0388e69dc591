"""The network interface over which a node's ranks reach the others: that of the node's Ray address.

By default, gloo binds to what the host's own name resolves to, which is 127.0.1.1 on Debian and Ubuntu, and NCCL to
the first interface that suits it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping, MutableMapping

UNREACHED_REMEDY = (
    "open all TCP ports between the nodes (one security group); where a node has several networks, set"
    " GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in its environment before `ray start`; `convmae doctor` tests it"
)
"""What to do if ranks do not reach each other."""


def interface_of(address: str, interfaces: Mapping[str, Iterable[str]]) -> str:
    """Name of the interface that has `address`; empty if none has.

    Args:
        address: IPv4 or IPv6.
        interfaces: Addresses by interface; an alias (`eth0:1`) counts as an interface.
    """
    wanted = _unscoped(address)
    for name, addresses in interfaces.items():
        if wanted in map(_unscoped, addresses):
            return name
    return ""


def choose_interface(node_address: str, environ: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL use the interface of `node_address`, unless `environ` already names one.

    Call it before a process group is made.

    Args:
        node_address: The address by which Ray's other nodes know this one; a name is looked up.
        environ: Of this process.
    """
    name = interface_of(_looked_up(node_address), _interfaces())
    if not name:
        return
    environ.setdefault("GLOO_SOCKET_IFNAME", name)
    environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign, every name that begins like this matches


def _interfaces() -> dict[str, list[str]]:
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [each.address for each in addresses if each.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }


def _unscoped(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address without the zone that psutil appends to link-local ones."""
    return ipaddress.ip_address(address.partition("%")[0])


def _looked_up(address: str) -> str:
    found: str = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    return found
