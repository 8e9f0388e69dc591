from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.cluster import address as cluster_address
from jobs.cluster.address import ClusterAddress, own_addresses
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
        ("HTTP://head:8265", "head", 8265, True, "http://head:8265"),
        ("[fe80::1%eth0]:6379", "fe80::1%eth0", 6379, False, "[fe80::1%eth0]:6379"),
        ("ray_head-1.svc:6379", "ray_head-1.svc", 6379, False, "ray_head-1.svc:6379"),
    ],
)
def test_an_address_has_one_canonical_form(text: str, host: str, port: int, is_http: bool, spelled: str) -> None:
    assert ClusterAddress.parse(text) == ClusterAddress(spelled, host, port, is_http)


@pytest.mark.parametrize(
    "text",
    [
        *["head", "head:port", "head:99999", "head:0", "http://head:0", "head:-1", "http://[::1", "ray://head:10001"],
        *["http://", ":6379", "http://head:8265/x?y", "http://head:8265#x", "http:/head:1", "file:///x", "local", " "],
        *["he ad:6379", "head\n:6379", "head\t:6379", "::1:6379", "[a]:1", "a..b:1", f"{'x' * 64}.org:1", "h|x:1"],
        *["\udcff:1", "head:6379,b:1", "http://http://a:1", "a@b:1", "head:\uff16\uff13"],
    ],
)
def test_an_invalid_address_is_refused_with_the_valid_forms(text: str) -> None:
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS: must .*http://HOST:8265"):
        ClusterAddress.parse(text)


@pytest.mark.parametrize("text", ["http://user:secret@head:8265", "user:secret@head:6379", "x:secret@[::1", "secret@"])
def test_a_password_in_an_address_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ClusterError, match="RAY_ADDRESS: must") as caught:
        ClusterAddress.parse(text)

    assert "secret" not in str(caught.value)


def test_an_address_where_nothing_listens_is_refused_in_seconds() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = ClusterAddress.parse(f"http://127.0.0.1:{probe.getsockname()[1]}")

        with pytest.raises(ClusterError, match="RAY_ADDRESS: must answer"):
            address.check_answers()


def test_a_dashboards_address_is_never_this_machines_and_auto_always_is() -> None:
    assert not ClusterAddress.parse("http://127.0.0.1:8265").is_of_this_machine()
    assert ClusterAddress.parse("auto").is_of_this_machine()


def test_addresses_of_this_machine_include_the_loopback() -> None:
    assert "127.0.0.1" in own_addresses()


def test_a_user_who_may_not_write_rays_logs_is_refused_before_ray_aborts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    nodes = [
        SimpleNamespace(node_manager_address="127.0.0.1", session_dir=str(tmp_path)),
        SimpleNamespace(node_manager_address="192.0.2.1", session_dir="/nonexistent"),
    ]
    monkeypatch.setattr(cluster_address, "known_nodes", lambda _: nodes)
    address = ClusterAddress.parse("127.0.0.1:6379")

    address.check_logs()  # folders of other machines do not matter

    nodes.append(SimpleNamespace(node_manager_address="127.0.0.1", session_dir="/nonexistent"))
    with pytest.raises(ClusterError, match=r"logs on this machine, in /nonexistent/logs, this user may write"):
        address.check_logs()
    ClusterAddress.parse("http://127.0.0.1:8265").check_logs()
