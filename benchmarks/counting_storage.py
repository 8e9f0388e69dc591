"""Storage that counts what is requested of it in this process."""

from __future__ import annotations

import threading

from pipeline.store.storage import Storage

_LOCK = threading.Lock()


class CountingStorage(Storage):
    """Counts requests that read, and the bytes that ranges had."""

    requests = 0
    read_bytes = 0

    @classmethod
    def forget(cls) -> None:
        """Count from zero."""
        CountingStorage.requests = CountingStorage.read_bytes = 0

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        """A request, and its bytes."""
        data = super().read_range(url, offset, length, etag)
        _count(len(data))
        return data

    def read(self, url: str) -> bytes:
        """A request."""
        _count(0)
        return super().read(url)

    def size(self, url: str) -> int:
        """A request."""
        _count(0)
        return super().size(url)

    def list_names(self, url: str) -> list[str]:
        """A request."""
        _count(0)
        return super().list_names(url)


def _count(read_bytes: int) -> None:
    with _LOCK:
        CountingStorage.requests += 1
        CountingStorage.read_bytes += read_bytes
