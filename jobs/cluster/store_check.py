"""The doctor's findings about the object store: how it is reached, and what it does under a URL."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from jobs.cluster.diagnosis import Finding
from pipeline.errors import StorageError, UserError
from pipeline.store.storage import Storage


def settings_finding(storage: Storage) -> Finding:
    """How S3 is reached from here, and which variable, profile or file says so; no secret is shown."""
    if storage.fault:
        return Finding("settings", "failed", f"{storage.fault.field}: {storage.fault.rule}", storage.fault.remedy)
    try:
        proxy = storage.proxies_here.for_url(storage.endpoint_url or "https://s3.amazonaws.com")
    except StorageError as error:
        return Finding("settings", "failed", f"{error.field}: {error.rule}", error.remedy)
    shown = {
        "endpoint": storage.endpoint_url or "AWS's own",
        "region": storage.region,
        "credentials": f"{storage.key[:4]}..." if storage.key else "",
        "ca_bundle": storage.ca_bundle or "",
        **{name: str(value) for name, value in storage.client},
    }
    parts = [f"{name} {shown.get(name, '')}".strip() + f" ({origin})" for name, origin in storage.origins]
    if proxy:
        parts.append(f"through the proxy {urlsplit(proxy).hostname}")
    return Finding("settings", "ok", "; ".join(parts))


def store_findings(storage: Storage, url: str) -> Iterator[Finding]:
    """Write, read, ranged read, conditional write and delete under `url`; stops at the first failure."""
    mine = Storage.join(url, f"doctor-{os.getpid()}-{os.urandom(4).hex()}")

    def written() -> bool:
        storage.write(mine, b"first")
        return storage.read(mine) == b"first"

    def exclusive() -> bool:
        return storage.create(mine + "-once", b"one") and not storage.create(mine + "-once", b"two")

    def deleted() -> bool:
        storage.delete(mine)
        return not storage.exists(mine)

    conditional = (
        "use a store that honours If-None-Match (AWS, SeaweedFS, MinIO and Ceph do), else two drivers may claim one run"
    )
    tries: list[tuple[str, Callable[[], bool], str]] = [
        ("write and read", written, "use a store that is consistent after a write"),
        ("ranged read", lambda: storage.read_range(mine, 1, 3) == b"irs", "use a store that honours Range"),
        ("conditional write", exclusive, conditional),
        ("delete", deleted, "allow s3:DeleteObject"),
    ]
    try:
        storage.check(url, write=False)
        for name, attempt, remedy in tries:
            began = time.perf_counter()
            if not attempt():
                yield Finding("store", "failed", f"{name} under {url} does not work as it should", remedy)
                return
            yield Finding("store", "ok", f"{name} in {1000 * (time.perf_counter() - began):.0f} ms")
    except (UserError, OSError) as error:
        remedy = error.remedy if isinstance(error, UserError) else "check the URL and what the credentials allow"
        yield Finding("store", "failed", str(error).partition("; ")[0], remedy)
    finally:
        for name in (mine, mine + "-once"):
            _forget(storage, name)


def _forget(storage: Storage, url: str) -> None:
    # The finding already says that the store does not work.
    with contextlib.suppress(UserError, OSError):
        storage.delete(url)
