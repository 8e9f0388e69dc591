"""A reader of single images, wherever a list says that they lie: a dead web server costs only its own images."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

from pipeline.access.urls import is_web
from pipeline.errors import RefusedError, UnreachableError
from pipeline.ingest.source import Source
from pipeline.store.storage import Storage

HASTY_SECONDS = 10.0
"""For a web server that never answered while others did, or that failed last; lists are full of these."""


class SourceReader:
    """A reader of the images of one task.

    What a web server does not serve counts as the image's fault as long as anything else can be read, and the image is
    skipped. A server that answered before and has become unreachable is waited for as long as any store, and then ends
    the task: its images may come back. A task of which nothing can be read ends, too: the fault is likely on this side.

    Concurrency: read() is safe to call from several threads.
    Blocking: until the image is there, or `storage.retry_seconds` have passed.
    """

    def __init__(
        self,
        storage: Storage,
        root: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        hasty_seconds: float = HASTY_SECONDS,
    ) -> None:
        self._storage = storage
        self._hasty = replace(storage, retry_seconds=min(hasty_seconds, storage.retry_seconds))
        self._root = root
        self._clock = clock
        self._lock = threading.Lock()
        self._answered: dict[str, float] = {}
        """When each host last answered; "" is everything but the web."""
        self._failing: set[str] = set()
        self._dead: dict[str, UnreachableError] = {}

    def read(self, source: Source) -> bytes:
        """The image's bytes.

        Raises:
            FileNotFoundError: It is gone.
            RefusedError: Its web server does not serve it, or is unreachable while others answer; or it is no image
                file, or its name leads elsewhere.
            UnreachableError: Its server answered before, and is unreachable now.
        """
        url = source.path.url(self._root)
        host = urlsplit(url).netloc if is_web(url) else ""
        with self._lock:
            if host in self._dead:
                raise _unreachable(url, self._dead[host])
            patient = host not in self._failing and (host in self._answered or not self._answered)
        began = self._clock()
        try:
            data = source.read(self._storage if patient else self._hasty, self._root)
        except UnreachableError as error:
            if not host or self._answered.get(host, began) < began:
                raise
            with self._lock:
                if host not in self._answered:
                    self._dead[host] = error
            raise _unreachable(url, error) from error
        except (FileNotFoundError, RefusedError):
            self._note(host)
            raise
        except OSError as error:  # it answered, and with a fault of its own
            if not host:
                raise
            self._note(host, failing=True)
            raise RefusedError("address", "must be served", url, error.strerror or str(error)) from error
        self._note(host)
        return data

    def check(self) -> None:
        """Make sure that some server answered; call when all was read.

        Raises:
            UnreachableError: No server of the task answered.
        """
        if self._dead and not self._answered:
            raise next(iter(self._dead.values()))

    def _note(self, host: str, *, failing: bool = False) -> None:
        with self._lock:
            self._answered[host] = self._clock()
            (self._failing.add if failing else self._failing.discard)(host)


def _unreachable(url: str, error: UnreachableError) -> RefusedError:
    return RefusedError("address", "must be reachable", url, f"its server cannot be reached: {error.remedy}")
