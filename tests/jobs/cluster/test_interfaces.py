from __future__ import annotations

import socket

import psutil
import pytest

from jobs.cluster.interfaces import choose_interface, interface_of

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "enp3s0": ["10.0.0.7", "fe80::21%enp3s0", "2001:db8::7"],
    "enp3s0:1": ["10.0.0.8"],
    "docker0": ["172.17.0.1"],
}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.7", "enp3s0"),
        ("10.0.0.8", "enp3s0:1"),
        ("2001:db8::7", "enp3s0"),
        ("2001:0db8:0:0::7", "enp3s0"),
        ("fe80::21", "enp3s0"),
        ("127.0.0.1", "lo"),
        ("127.0.1.1", ""),
        ("10.0.0.70", ""),
    ],
)
def test_the_interface_is_the_one_that_has_the_address(address: str, name: str) -> None:
    assert interface_of(address, INTERFACES) == name


def test_the_local_stack_stays_on_the_loopback_interface() -> None:
    (loopback,) = (
        name for name, found in psutil.net_if_addrs().items() if any(each.address == "127.0.0.1" for each in found)
    )
    environ: dict[str, str] = {}

    choose_interface("127.0.0.1", environ)

    assert environ == {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}
    assert loopback in dict(socket.if_nameindex()).values()


def test_what_the_user_set_stays() -> None:
    environ = {"NCCL_SOCKET_IFNAME": "ib0"}

    choose_interface("127.0.0.1", environ)

    assert environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert environ["GLOO_SOCKET_IFNAME"]
    environ = {"GLOO_SOCKET_IFNAME": "eth9", "NCCL_SOCKET_IFNAME": "eth9"}
    choose_interface("127.0.0.1", environ)
    assert set(environ.values()) == {"eth9"}


def test_an_address_of_no_interface_leaves_the_choice_to_gloo_and_nccl() -> None:
    environ: dict[str, str] = {}

    choose_interface("192.0.2.1", environ)

    assert environ == {}
