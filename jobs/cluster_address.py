"""What RAY_ADDRESS may be, and whether this machine is a node of the cluster that it names.

A driver needs a raylet beside it: `ray.init` takes neither a dashboard's HTTP address nor a machine that is no node.
From there a cluster takes jobs alone.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from jobs.errors import ClusterError
from pipeline.proxies import Proxies

VARIABLE = "RAY_ADDRESS"
CONNECT_SECONDS = 5.0
HTTP_PORTS = {"http": 80, "https": 443}
FORMS = "write http://HOST:8265 (the dashboard), or HOST:6379 on a node of the cluster"
IS_IT_UP = "is it up? `convmae up` starts a local one"


@dataclass(frozen=True)
class ClusterAddress:
    """A Ray cluster: its dashboard's HTTP address, HOST:PORT of its head, or `auto` for the one on this machine."""

    text: str
    """In one spelling, so that equal clusters have equal texts."""
    host: str
    """Empty for `auto`."""
    port: int
    is_http: bool

    @classmethod
    def parse(cls, text: str) -> ClusterAddress:
        """Read RAY_ADDRESS.

        Raises:
            ClusterError: It is none of the three forms.
        """
        bare = text.strip().rstrip("/")
        if bare == "auto":
            return cls(bare, "", 0, is_http=False)
        scheme, separator, place = bare.rpartition("://")
        try:
            parts = urlsplit(f"//{place}")
            host, port = parts.hostname or "", parts.port or HTTP_PORTS.get(scheme, 0)
        except ValueError as error:  # a port that is no number or above 65535, a bracket that is not closed
            raise ClusterError(VARIABLE, f"must name a host and a port ({error})", text, FORMS) from None
        if scheme not in ("", *HTTP_PORTS) or parts.path or parts.query or not host or not port:
            raise ClusterError(VARIABLE, "must be http://HOST:PORT or HOST:PORT", text, FORMS)
        named = f"[{host}]" if ":" in host else host
        return cls(f"{scheme}{separator}{named}:{port}", host, port, is_http=bool(scheme))

    def check_answers(self) -> None:
        """Find out in seconds that nobody listens; Ray would try for minutes.

        Raises:
            ClusterError: Nobody does.
        """
        if not self.host:
            return
        try:
            socket.create_connection(self._first_hop(), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise ClusterError(VARIABLE, f"must answer ({error})", self.text, IS_IT_UP) from error

    def _first_hop(self) -> tuple[str, int]:
        """What is connected to: the cluster, or the HTTP proxy before it."""
        proxy = http_proxy(self.text) if self.is_http else None
        if proxy is None:
            return self.host, self.port
        parts = urlsplit(proxy)
        return str(parts.hostname), parts.port or HTTP_PORTS[parts.scheme]

    def is_of_this_machine(self) -> bool:
        """Whether this machine is a node of the cluster; asks its head, unless it speaks HTTP.

        Raises:
            ClusterError: The head does not answer, or not to us.
        """
        if self.is_http or not self.host:
            return not self.is_http
        self.check_answers()
        return bool(_node_addresses(self) & own_addresses())


def http_proxy(address: str) -> str | None:
    """The proxy through which Ray's clients ask a cluster by HTTP: they read this process's environment.

    Raises:
        StorageError: It is no HTTP proxy.
    """
    return Proxies.from_environment(os.environ).for_url(address)


def own_addresses() -> set[str]:
    """IP addresses of this machine's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        address.address.partition("%")[0]
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in families
    }


def _node_addresses(address: ClusterAddress) -> set[str]:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.exceptions import RayError

    try:
        nodes = GcsClient(address=address.text).get_all_node_info(timeout=CONNECT_SECONDS)
    except (RayError, RuntimeError, OSError, ValueError) as error:
        raise refusal(address.text, error) from error
    return {node.node_manager_address for node in nodes.values()}


def refusal(address: str, error: BaseException) -> ClusterError:
    """What to tell of a cluster that answered with an error; one that asks for a token gets a remedy of its own."""
    from ray.exceptions import AuthenticationError

    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = lines[0].partition(". ")[0]  # Ray goes on with how to make tokens
    if isinstance(error, AuthenticationError) or "Unauthenticated" in str(error):
        remedy = "set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN or in the file RAY_AUTH_TOKEN_PATH"
        return ClusterError(VARIABLE, f"must let this shell in ({told})", address, remedy)
    return ClusterError(VARIABLE, f"must answer ({told})", address, IS_IT_UP)
