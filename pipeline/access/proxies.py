"""HTTP proxies by URL: those of the user's variables, and none for this machine's loopback addresses.

The libraries below us differ: botocore knows no ALL_PROXY, aiohttp looks at no variable unless it may send passwords of
.netrc too, and only some know networks in NO_PROXY. So it is decided here, once, and passed to each of them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
from yarl import URL

from pipeline.errors import StorageError

LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
"""As NO_PROXY names it; not every library understands each of them."""
_PORTS = {"http": 80, "https": 443}
_FORM = "write http://HOST:PORT, or unset it; NO_PROXY lists hosts that need none"


@dataclass(frozen=True)
class Proxies:
    """HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY of one environment, in either case.

    The lower case wins, as for curl and urllib, also where it is empty: that switches one off for a single command.
    """

    http: str = field(default="", repr=False)  # proxies may have passwords
    https: str = field(default="", repr=False)
    any: str = field(default="", repr=False)
    no_proxy: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Proxies:
        """Read the variables; a fault in one is reported when a URL would go through it."""
        return cls(*(_variable(environ, name) for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")))

    @property
    def are_named(self) -> bool:
        """Whether there is any."""
        return bool(self.http or self.https or self.any)

    def for_url(self, url: str) -> str | None:
        """Address of the proxy through which an http address is asked; None: none.

        Raises:
            StorageError: It is no address of an HTTP proxy.
        """
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        if is_loopback(host) or self._is_exempt(host, parts.port or _PORTS.get(parts.scheme, 0)):
            return None
        own = {"http": self.http, "https": self.https}.get(parts.scheme, "")
        name = f"{parts.scheme.upper()}_PROXY" if own else "ALL_PROXY"
        proxy = own or self.any
        return _address(name, proxy) if proxy else None

    def for_endpoint(self, url: str) -> dict[str, str]:
        """The same as botocore takes it for a client; never None, at which it would look by itself."""
        proxy = self.for_url(url)
        return {"http": proxy, "https": proxy} if proxy else {}

    def _is_exempt(self, host: str, port: int) -> bool:
        entries = (entry.strip().lower() for entry in self.no_proxy.split(","))
        return any(_is_meant(entry, host, port) for entry in entries if entry)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address alone; nothing is resolved."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _ip(host)
    if address is None:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool(address.is_loopback or address.is_unspecified or (mapped and mapped.is_loopback))


def without_loopback(environ: Mapping[str, str]) -> dict[str, str]:
    """NO_PROXY in both cases, with what either of them lists and the loopback addresses.

    For libraries that read the environment themselves, in this process and its children.
    """
    listed = [entry.strip() for name in ("no_proxy", "NO_PROXY") for entry in environ.get(name, "").split(",")]
    entries = dict.fromkeys(entry for entry in (*listed, *LOOPBACK) if entry)
    value = "*" if "*" in entries else ",".join(entries)  # a star counts only where it is alone
    return {"NO_PROXY": value, "no_proxy": value}


def proxy_middleware(
    now: Callable[[], Proxies],
) -> Callable[[aiohttp.ClientRequest, Any], Awaitable[aiohttp.ClientResponse]]:
    """Middleware that sends each request of an aiohttp session, and each redirect, through the proxy of its own URL.

    Args:
        now: The proxies, asked for at each request: sessions are kept for as long as a process lives.
    """

    async def through_proxy(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        if proxy := now().for_url(str(request.url)):
            request.update_proxy(URL(proxy), None, None)  # aiohttp takes a password out of the address itself
        answer: aiohttp.ClientResponse = await handler(request)
        return answer

    return through_proxy


def _variable(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, environ.get(name.upper(), "")).strip()


def _address(variable: str, text: str) -> str:
    address = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(address)
        is_proxy = parts.scheme in _PORTS and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        is_proxy = False
    if not is_proxy:
        raise StorageError(variable, "must be the address of an HTTP proxy", _without_password(address), _FORM)
    return address


def _without_password(address: str) -> str:
    scheme, _, rest = unquote(address).partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _is_meant(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY means a host: its name, a domain that it is in, its address or network."""
    if entry == "*":
        return True
    with contextlib.suppress(ValueError):
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
        address = _ip(host)
        return address is not None and address in network
    name, separator, number = entry.rpartition(":")
    if separator and number.isdigit():
        entry = name.strip("[]")
        if int(number) != port:
            return False
        if (address := _ip(host)) is not None:
            return address == _ip(entry)
    domain = entry.removeprefix("*").strip(".")
    return bool(domain) and (host == domain or host.endswith(f".{domain}"))


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    with contextlib.suppress(OSError):  # 127.1 and the like, which resolvers take
        return ipaddress.IPv4Address(socket.inet_aton(host)) if host[:1].isdigit() else None
    return None
