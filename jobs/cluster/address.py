"""The cluster's address, RAY_ADDRESS, and whether this machine is a node of that cluster.

A driver needs a raylet on its own machine: `ray.init` accepts neither a dashboard's HTTP address nor a machine that is
not a node. From such a machine a cluster takes only jobs.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from jobs.errors import ClusterError, DependencyError
from pipeline.access.proxies import Proxies

VARIABLE = "RAY_ADDRESS"
CONNECT_SECONDS = 5.0
HTTP_PORTS = {"http": 80, "https": 443}
FORMS = "write http://HOST:8265 (the dashboard), or on a node of the cluster HOST:6379 or auto"
IS_IT_UP = "is it up? `convmae up` starts a local one"


@dataclass(frozen=True)
class ClusterAddress:
    """A Ray cluster: its dashboard's HTTP address, HOST:PORT of its head, or `auto` for the one on this machine."""

    text: str
    """In canonical form, so that equal clusters have equal texts."""
    host: str
    """Empty for `auto`."""
    port: int
    is_http: bool

    @classmethod
    def spelled(cls, text: str) -> str:
        """An address in canonical form; an invalid one is returned as it is, to be refused where it is used."""
        try:
            return cls.parse(text).text
        except ClusterError:
            return text

    @classmethod
    def parse(cls, text: str) -> ClusterAddress:
        """Read RAY_ADDRESS.

        Raises:
            ClusterError: It has none of the three forms.
        """
        bare = text.strip().rstrip("/")
        if bare == "auto":
            return cls(bare, "", 0, is_http=False)
        scheme, separator, place = bare.rpartition("://")
        scheme = scheme.lower()
        try:
            if place.split() != [place]:  # urlsplit ignores some
                raise ValueError("it must contain no blanks")
            parts = urlsplit(f"//{place}")
            host, given = parts.hostname or "", parts.port
            _check_host(host)
        except ValueError as error:  # a port that is not a number or above 65535, a bracket that is not closed
            reason = str(error) if "@" not in place else "what precedes @ is part of it"
            raise ClusterError(
                VARIABLE, f"must name a host and a port ({reason})", _without_user(bare), FORMS
            ) from None
        port = HTTP_PORTS.get(scheme, 0) if given is None else given
        rest = parts.path or parts.query or parts.fragment
        if scheme not in ("", *HTTP_PORTS) or "@" in place or rest or not port:
            rule = "must be http://HOST:PORT or HOST:PORT, without user, path or query"
            raise ClusterError(VARIABLE, rule, _without_user(bare), FORMS)
        named = f"[{host}]" if ":" in host else host
        return cls(f"{scheme}{separator}{named}:{port}", host, port, is_http=bool(scheme))

    def check_answers(self) -> None:
        """Check within seconds that something listens there; Ray would try for minutes.

        Raises:
            ClusterError: Nothing does.
        """
        if not self.host:
            return
        try:
            socket.create_connection(self._first_hop(), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise ClusterError(VARIABLE, f"must answer ({error})", self.text, IS_IT_UP) from error

    def _first_hop(self) -> tuple[str, int]:
        """Host and port to connect to: the cluster, or the HTTP proxy in front of it."""
        proxy = http_proxy(self.text) if self.is_http else None
        if proxy is None:
            return self.host, self.port
        parts = urlsplit(proxy)
        return str(parts.hostname), parts.port or HTTP_PORTS[parts.scheme]

    def is_of_this_machine(self) -> bool:
        """Whether this machine is a node of the cluster; asks its head, unless it speaks HTTP.

        Raises:
            ClusterError: The head does not answer, or refuses us.
        """
        if self.is_http or not self.host:
            return not self.is_http
        self.check_answers()
        return bool({node.node_manager_address for node in known_nodes(self)} & own_addresses())

    def check_logs(self) -> None:
        """Check that this user may write where drivers on this machine log; else Ray would abort the process.

        Raises:
            ClusterError: The user may not.
        """
        if self.is_http or not self.host:
            return
        here = own_addresses()
        for node in known_nodes(self):
            logs = Path(node.session_dir or "/", "logs")
            if node.session_dir and node.node_manager_address in here and not os.access(logs, os.W_OK | os.X_OK):
                rule = f"must be a cluster whose logs on this machine, in {logs}, this user may write"
                remedy = (
                    "run as the user who started it, or name its dashboard, http://HOST:8265: commands then run there"
                )
                raise ClusterError(VARIABLE, rule, self.text, remedy)


def http_proxy(address: str) -> str | None:
    """The proxy through which Ray's clients reach a cluster by HTTP; they read this process's environment.

    Raises:
        StorageError: It is not an HTTP proxy.
    """
    return Proxies.from_environment(os.environ).for_url(address)


def _check_host(host: str) -> None:
    """Refuse a host that cannot be looked up.

    Raises:
        ValueError: It is neither a name nor an address.
    """
    if ":" in host:
        ipaddress.IPv6Address(host)
    elif not re.fullmatch(rb"[a-z0-9._-]+", host.encode("idna")):  # which refuses empty and long labels
        raise ValueError(f"{host!a} is not a host name")


def _without_user(text: str) -> str:
    """An address for a message: what precedes @ may be a password."""
    head, at, place = text.rpartition("@")
    return f"{head[: head.find('://') + 3] if '://' in head else ''}...@{place}" if at else text


def own_addresses() -> set[str]:
    """IP addresses of this machine's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        address.address.partition("%")[0]
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in families
    }


def known_nodes(address: ClusterAddress) -> list[Any]:
    """What Ray's head says of each node."""
    from ray.exceptions import RayError

    from jobs.cluster.ray_internals.core import nodes_of

    try:
        return nodes_of(address.text, CONNECT_SECONDS)
    except DependencyError:
        raise
    except (RayError, RuntimeError, OSError, ValueError) as error:
        raise refusal(address.text, error) from error


def refusal(address: str, error: BaseException) -> ClusterError:
    """The error for a cluster that answered with one; a cluster that asks for a token gets a remedy of its own."""
    from ray.exceptions import AuthenticationError

    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[0].partition(". ")[0]  # Ray then explains how to make tokens
    if isinstance(error, AuthenticationError) or "Unauthenticated" in str(error):
        remedy = "set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN or in the file RAY_AUTH_TOKEN_PATH"
        return ClusterError(VARIABLE, f"must let this shell in ({reason})", address, remedy)
    return ClusterError(VARIABLE, f"must answer ({reason})", address, IS_IT_UP)
