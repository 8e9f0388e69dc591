from __future__ import annotations

import socket

import pytest

from jobs.cluster_address import ClusterAddress, own_addresses
from jobs.errors import ClusterError


@pytest.mark.parametrize(
    ("text", "host", "port", "is_http", "spelled"),
    [
        ("http://head:8265", "head", 8265, True, "http://head:8265"),
        (" http://head:8265/ ", "head", 8265, True, "http://head:8265"),
        ("https://ray.example.org", "ray.example.org", 443, True, "https://ray.example.org:443"),
        ("http://[fd00::1]:8265", "fd00::1", 8265, True, "http://[fd00::1]:8265"),
        ("10.0.0.1:6379", "10.0.0.1", 6379, False, "10.0.0.1:6379"),
        ("127.0.0.1:6379 ", "127.0.0.1", 6379, False, "127.0.0.1:6379"),
        ("auto", "", 0, False, "auto"),
    ],
)
def test_an_address_has_one_spelling(text: str, host: str, port: int, is_http: bool, spelled: str) -> None:
    assert ClusterAddress.parse(text) == ClusterAddress(spelled, host, port, is_http)


@pytest.mark.parametrize(
    "text",
    ["head", "head:port", "head:99999", "http://[::1", "ray://head:10001", "http://", ":6379", "http://head:8265/x?y"],
)
def test_what_is_no_address_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS: must .*http://HOST:8265"):
        ClusterAddress.parse(text)


def test_nobody_who_listens_is_found_out_in_seconds() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = ClusterAddress.parse(f"http://127.0.0.1:{probe.getsockname()[1]}")

        with pytest.raises(ClusterError, match="RAY_ADDRESS: must answer"):
            address.check_answers()


def test_a_dashboard_is_never_of_this_machine_and_auto_always() -> None:
    assert not ClusterAddress.parse("http://127.0.0.1:8265").is_of_this_machine()
    assert ClusterAddress.parse("auto").is_of_this_machine()


def test_addresses_of_this_machine_hold_the_loopback() -> None:
    assert "127.0.0.1" in own_addresses()
