"""fsspec file systems that this process has open: one connection pool for each Storage and server."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from pipeline.access.proxies import proxy_middleware
from pipeline.access.store_access import StoreAccess
from pipeline.access.urls import GOOGLE, HTTP, S3, kind_of, protocol_of, server_of
from pipeline.store.s3_filesystem import CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS, open_s3

MOST = 16
"""Open at the same time."""
RENEW_SECONDS = 1.0
"""Between two renewals: making a client takes a tenth of a second of CPU, and many threads ask for one at once."""


@dataclass(frozen=True)
class _Opened:
    filesystem: Any
    renewals: int
    at_seconds: float


# By Storage, protocol, server and process. fsspec's own cache would make one for each thread. There is no lock: one
# that a thread holds while another forks stays shut in the child, and a file system that is made twice is let go.
_opened: dict[tuple[Any, ...], _Opened] = {}


def file_system(storage: StoreAccess, url: str) -> Any:
    """The file system on which `url` lies."""
    key = _key(storage, url)
    found = _opened.get(key) or _opened.setdefault(key, _Opened(_made(storage, url, 0), 0, time.monotonic()))
    while len(_opened) > MOST:
        _opened.pop(next(iter(_opened)), None)
    return found.filesystem


def renew(storage: StoreAccess, url: str, used: Any) -> None:
    """Have the next call use a new file system in place of `used`, whose credentials were refused.

    Calls that are under way end on the old one, which is closed when it is no longer referenced.
    """
    key = _key(storage, url)
    found = _opened.get(key)
    if found and found.filesystem is used and time.monotonic() - found.at_seconds >= RENEW_SECONDS:
        renewals = found.renewals + 1
        _opened[key] = _Opened(_made(storage, url, renewals), renewals, time.monotonic())


def _key(storage: StoreAccess, url: str) -> tuple[Any, ...]:
    return storage, protocol_of(url), server_of(url), os.getpid()


def _made(storage: StoreAccess, url: str, renewals: int) -> Any:
    protocol = protocol_of(url)
    if protocol in S3:
        if storage.fault:
            raise storage.fault
        return open_s3(storage, renewals)
    kind = kind_of(protocol)
    if protocol in HTTP:
        limits = aiohttp.ClientTimeout(None, sock_connect=CONNECT_TIMEOUT_SECONDS, sock_read=READ_TIMEOUT_SECONDS)
        client = {"timeout": limits, "middlewares": (proxy_middleware(lambda: storage.proxies_here),)}
        return kind(use_listings_cache=False, client_kwargs=client, skip_instance_cache=True)
    if protocol == "memory":
        return kind()
    if protocol in GOOGLE:  # gcsfs's own choice asks a second service for each bucket's type, for a minute if need be
        from gcsfs.core import GCSFileSystem

        for name in ("gcsfs", "google.auth"):  # what they log is raised as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        session = {"middlewares": (proxy_middleware(lambda: storage.proxies_here),)}
        return GCSFileSystem(use_listings_cache=False, skip_instance_cache=True, session_kwargs=session)
    return kind(use_listings_cache=False, skip_instance_cache=True, **dict(server_of(url)))
