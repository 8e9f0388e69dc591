"""Storage that knows how much was read from it."""

from __future__ import annotations

from pipeline.storage import Storage


class CountingStorage(Storage):
    """Counts what was read by ranges."""

    read_bytes = 0

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        data = super().read_range(url, offset, length, etag)
        CountingStorage.read_bytes += len(data)
        return data
